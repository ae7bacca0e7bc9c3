"""Restore shards: a step that some world captured in its shards, loaded into those of another.

Every rank reads exactly the boxes it holds now, each element once, from its own arena first, then
from other arenas of its node, then through other nodes' byte servers; no rank waits for another.
What is damaged is struck from its arena, so that nobody counts on it again.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ftkit.checkpoint.arena import Arena
from ftkit.checkpoint.fetch import fetch
from ftkit.checkpoint.layout import StateLayout
from ftkit.checkpoint.load import load_state, small_of_seats, small_of_stages
from ftkit.checkpoint.open_part import Address
from ftkit.checkpoint.ports import BoxSource
from ftkit.checkpoint.sources import SnapshotSource
from ftkit.checkpoint.state import ProtectedState
from ftkit.core.errors import IntegrityError, WireError
from ftkit.core.ids import Generation, NodeId, Seat, Step
from ftkit.core.inventory import Copy, Inventory, Tier, covered_layouts


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardsRestored:
    """What `restore_shards` did."""

    layout: StateLayout
    """Of the state now."""
    bytes: int
    """Loaded in all."""
    moved: int
    """Of which from arenas of other seats."""
    sources: tuple[str, ...]
    """Those that gave something."""
    seconds: float
    patched: int = 0
    """Bytes of what nobody had any more, from the sources of a `Patch`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Older:
    """What a patch puts in place of what is lost."""

    sources: Sequence[BoxSource]
    smalls: Sequence[Mapping[str, Any]] = ()
    """Small state of the seats that held it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Patch:
    """How to make up for shards that no arena has any more."""

    generation: Generation
    """In which what is left was captured."""
    layouts: int
    """Layouts that are left whole. All of them must be at hand: no more is patched than was agreed."""
    make: Callable[[ProtectedState, Mapping[Seat, SnapshotSource], ExitStack], Older]
    """Given what is to be loaded, and what is left by seat; sources may be closed with the stack."""


class Incomplete(IntegrityError):
    """The step is not whole among the copies known: it may still be on its way."""


def whole_layout(layout: StateLayout) -> StateLayout:
    """The layout of a rank that would hold every tensor of `layout` whole; pure."""
    boxes = {
        e.name: e.signature._replace(
            box=e.box._replace(offsets=(0,) * len(e.global_shape), shape=e.global_shape)
        )
        for e in layout.entries
    }
    return StateLayout.of_boxes(list(boxes.values()), small_bytes=layout.small_bytes)


def order(
    copies: Sequence[Copy], *, seat: Seat, node: NodeId, servers: Mapping[NodeId, Address]
) -> list[tuple[Copy, Address | None]]:
    """Copies that can be reached, nearest first, each with its byte server (None: here); pure."""
    reachable = [
        (c, None if c.node == node else servers[c.node])
        for c in copies
        if c.tier is Tier.ARENA and (c.node == node or c.node in servers)
    ]
    nodes = 1 + max((c.node for c in copies), default=0)
    return sorted(
        reachable,
        key=lambda found: (
            found[1] is not None,
            found[0].seat != seat,
            # Ranks begin at different servers, so that they do not all queue at one.
            (found[0].node - node) % nodes,
            found[0].seat,
        ),
    )


def restore_shards(
    inventory: Inventory,
    state: ProtectedState,
    *,
    step: Step,
    seat: Seat,
    node: NodeId,
    servers: Mapping[NodeId, Address],
    secret: bytes,
    timeout_s: float = 10.0,
    stages: bool = False,
    near: Sequence[BoxSource] = (),
    patch: Patch | None = None,
) -> ShardsRestored:
    """Load what this rank holds of `step` now, whoever held it then. Blocks.

    Args:
      inventory: the copies known.
      state: what to load into, in place.
      step: which.
      seat: who loads.
      node: the node it is on.
      servers: the byte server of each node that has one.
      secret: the job's, for byte servers.
      timeout_s: the longest silence of a byte server.
      stages: ranks hold other tensors, rather than parts of the same.
      near: sources in this process that have some of the step already; they are asked first.
      patch: makes up for shards that are lost; the result is then not the state that was.

    Raises:
      Incomplete: the step is not whole in the inventory. Nothing was changed.
      IntegrityError: what was whole turned out to be damaged or gone. The state may be partly
        loaded: load another step before going on.
      StateChanged: it is the state of another model. Nothing was changed.
    """
    start = time.monotonic()
    generation = patch.generation if patch else inventory.complete().get(step)
    if generation is None:
        raise Incomplete(
            f"step {step} is not complete among {len(inventory.copies)} known copies, which are of "
            f"steps {sorted({c.step for c in inventory.copies})}"
        )
    copies = order(inventory.of(step, generation), seat=seat, node=node, servers=servers)
    with ExitStack() as opened:
        sources, of = list[SnapshotSource](), list[Copy]()
        for copy, server in copies:
            with suppress(WireError, OSError, IntegrityError):
                sources.append(opened.enter_context(open_copy(copy, server, secret, timeout_s)))
                of.append(copy)
        if not sources:
            raise IntegrityError(f"none of {len(copies)} parts of step {step} can be read")
        nearest_last = reversed(list(zip(of, sources, strict=True)))
        smalls: dict[Seat, Mapping[str, Any]] = {c.seat: s.head.small for c, s in nearest_last}
        older = Older(sources=())
        if patch is not None:
            if len(covered_layouts(c.part for c in of)) < patch.layouts:
                raise Incomplete(f"of step {step} more than agreed is lost, or out of reach")
            older = patch.make(state, dict(zip((c.seat for c in of), sources, strict=True)), opened)
            smalls = with_older(smalls, older.smalls)
        small = small_of_stages(smalls, seat) if stages else small_of_seats(smalls, seat)
        try:
            report = load_state(state, [*near, *sources, *older.sources], small=small, stage=stages)
            if patch is not None and report.fallbacks:
                # What is damaged would be patched as well, and nobody has agreed to that.
                raise IntegrityError(f"{report.fallbacks[0].source}: {report.fallbacks[0].reason}")
        except IntegrityError:
            for copy, server in copies:
                if server is None:
                    _strike(copy)
            raise
        damaged = {f.source for f in report.fallbacks}
        for copy, server in copies:
            if server is None and Path(copy.path).name in damaged:
                _strike(copy)
    exact_end = len(near) + len(of)
    given = list(zip(of, report.bytes_by_source[len(near) : exact_end], strict=True))
    return ShardsRestored(
        layout=state.layout(),
        bytes=report.bytes,
        moved=sum(count for copy, count in given if copy.seat != seat),
        sources=tuple(Path(copy.path).name for copy, count in given if count),
        seconds=time.monotonic() - start,
        patched=sum(report.bytes_by_source[exact_end:]),
    )


def with_older(
    smalls: Mapping[Seat, Mapping[str, Any]], older: Sequence[Mapping[str, Any]]
) -> dict[Seat, Mapping[str, Any]]:
    """Small state by seat, with that of lost parts behind: it counts for what no other tells of; pure."""
    told = dict(smalls)
    for small in older:
        optimizers = dict[str, Any]()
        for name, kept in small["optimizers"].items():
            others = [s["optimizers"][name] for s in told.values()]
            known = {p for o in others for g in o["groups"] for p in g["params"]}
            groups = [
                {**g, "params": [p for p in g["params"] if p not in known]} for g in kept["groups"]
            ]
            other = {p: value for p, value in kept["other"].items() if p not in known}
            optimizers[name] = {**kept, "groups": groups, "other": other}
        told[Seat(max(told, default=Seat(-1)) + 1)] = {**small, "optimizers": optimizers}
    return told


@contextmanager
def open_copy(
    copy: Copy, server: Address | None, secret: bytes, timeout_s: float
) -> Iterator[SnapshotSource]:
    """Read a part from its arena here, or through a byte server; struck here if it is damaged.

    Raises:
      IntegrityError: it is not there, or its head is damaged.
      WireError, OSError: it cannot be reached.
    """
    path = Path(copy.path)
    if server is not None:
        with fetch(
            server, secret, path.name, copy.step, copy.generation, timeout_s=timeout_s
        ) as remote:
            name = f"{path.name} on node {copy.node}"
            yield SnapshotSource(remote.head, partial(remote.blocks), name=name)
        return
    try:
        arena = Arena.open(path)
        source = SnapshotSource.of_arena(arena, copy.step, copy.generation)
    except IntegrityError:
        _strike(copy)
        raise
    with arena:
        yield source


def _strike(copy: Copy) -> None:
    """Have an arena of this node forget a part, if it is not what was sealed."""
    with suppress(IntegrityError, OSError), Arena.open(Path(copy.path), writable=True) as arena:
        sealed = arena.find(copy.step, copy.generation)
        try:
            arena.verify(sealed)
        except IntegrityError:
            arena.drop(sealed)
