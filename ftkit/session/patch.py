"""Patch: what this rank loads in place of shards that are lost, as the plan says.

What is left is loaded as it was captured; these sources are asked for nothing else. Each rank reads
what it holds of them in the new world, as it does of the rest.
"""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

from ftkit.checkpoint.fetch import fetch
from ftkit.checkpoint.restore_shards import Incomplete, Older, Patch
from ftkit.checkpoint.sources import SnapshotSource
from ftkit.checkpoint.state import ProtectedState
from ftkit.core.errors import WireError
from ftkit.core.ids import Seat
from ftkit.recovery.approximation import Approximation
from ftkit.recovery.policy import Option
from ftkit.session.layers import Layers
from ftkit.session.mean_stage import MeanStage
from ftkit.session.parts import Parts


def patch_of(taken: Approximation, parts: Parts, layers: Layers | None) -> Patch:
    """How this rank makes up for what `taken` says is lost. Blocks until all ranks have asked.

    Raises:
      GenerationAborted: the world ended meanwhile.
    """
    make = partial(_stale, taken, parts)
    if taken.way is not Option.STALE_SHARD:
        assert layers is not None, "only pipelines allow it"
        told = parts.group.exchange(json.dumps([parts.seat, layers.grad_norm]).encode()).wait()
        norms = {Seat(seat): norm for seat, norm in map(json.loads, told) if norm is not None}
        make = partial(_mean, taken, norms, layers, parts)
    return Patch(generation=taken.generation, layouts=taken.layouts, make=make)


def _stale(
    taken: Approximation,
    parts: Parts,
    state: ProtectedState,
    left: Mapping[Seat, SnapshotSource],
    opened: ExitStack,
) -> Older:
    """Older copies of the lost shards."""
    assert parts.env is not None, "asked by a member of a job"
    if taken.checkpoint:
        # Imported here: most ranks never read one, and pyarrow takes its time.
        from ftkit.checkpoint.persist.checkpoint import open_checkpoint
        from ftkit.checkpoint.persist.source import CheckpointSource, small_by_seat
        from ftkit.checkpoint.persist.store import open_store

        found = open_checkpoint(open_store(parts.env.checkpoint_dir), taken.checkpoint)
        smalls = small_by_seat(found)
        return Older(
            sources=[CheckpointSource(found)], smalls=[smalls[seat] for seat in sorted(smalls)]
        )
    sources = list[SnapshotSource]()
    for old in taken.old:
        copy = old.copy
        try:
            remote = fetch(
                (old.host, old.port),
                bytes.fromhex(parts.env.secret),
                copy.path,
                copy.step,
                copy.generation,
            )
        except (WireError, OSError) as error:
            # Its node may be lost by now: then this world ends, and what is left is judged anew.
            raise Incomplete(f"node {copy.node} does not give what it keeps: {error}") from error
        opened.enter_context(remote)
        name = f"{copy.path} of step {copy.step} on node {copy.node}"
        sources.append(SnapshotSource(remote.head, partial(remote.blocks), name=name))
    return Older(sources=sources, smalls=[s.head.small for s in sources])


def _mean(
    taken: Approximation,
    norms: Mapping[Seat, float],
    layers: Layers,
    parts: Parts,
    state: ProtectedState,
    left: Mapping[Seat, SnapshotSource],
    opened: ExitStack,
) -> Older:
    """Lost stages from their neighbours."""
    wanted = state.targets().wanted({}, None)
    made = list[MeanStage]()
    smalls = list[Mapping[str, Any]]()
    for seat in taken.lost:
        at = taken.seats.index(seat)
        before = taken.seats[at - 1] if at else None
        after = taken.seats[at + 1] if at + 1 < len(taken.seats) else None
        one = None if before is None else left[before]
        other = None if after is None else left[after]
        both = tuple(None if s is None else norms.get(s) for s in (before, after))
        mean = MeanStage(one, other, wanted, norms=(both[0], both[1]), stage=at)
        made.append(mean)
        nearest = one or other
        assert nearest is not None, "a stage that is lost alone has a neighbour"
        smalls.append(mean.small(nearest.head.small))
        layers.raised |= set(range(mean.first, mean.end))
        held = [mean.first, mean.end]
        if one is not None and other is not None:
            parts.trace.event("averaged", stage=at, norms=both, layers=held)
            continue
        swap, pairs = layers.swap, sorted(mean.made_of.items())
        if not pairs and not mean.copied:
            continue
        parts.trace.event(
            "taken-over",
            stage=at,
            layers=held,
            made_of=pairs,
            copied=sorted(mean.copied),
            learned=swap is not None and all(swap.learned(*pair) for pair in pairs),
        )
    return Older(sources=made, smalls=smalls)
