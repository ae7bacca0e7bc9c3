"""Restore: from an inventory to live tensors, by the nearest copy that proves whole.

`plan` is pure: it orders the copies of one step, own arena first, then other arenas on this
node, then arenas of other nodes through their agents' byte servers. `execute` tries them in
that order, checks every byte, and treats what is damaged or unreachable as lost.
"""

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from ftkit.checkpoint.arena import Arena
from ftkit.checkpoint.fetch import fetch
from ftkit.checkpoint.state import ProtectedState
from ftkit.core.errors import IntegrityError, WireError
from ftkit.core.ids import Generation, NodeId, Seat, Step
from ftkit.core.inventory import Copy, Inventory, Tier

Address = tuple[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One copy, and how to reach it."""

    copy: Copy
    server: Address | None = None
    """The byte server of the copy's node; None when the file is on this node."""

    def __str__(self) -> str:
        where = "this node" if self.server is None else f"node {self.copy.node}"
        return f"{Path(self.copy.path).name} on {where}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RestorePlan:
    """Which step, and from where, best first."""

    step: Step
    sources: tuple[Source, ...]
    unreachable: tuple[Copy, ...] = ()
    """Copies of that step that no known path leads to: other tiers, nodes without a server."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """What `execute` did."""

    source: Source
    step: Step
    generation: Generation
    bytes: int
    seconds: float
    failures: tuple[tuple[Source, str], ...]
    """Sources that were tried before, and what was wrong with each."""


def plan(
    inventory: Inventory,
    *,
    seat: Seat,
    node: NodeId,
    servers: Mapping[NodeId, Address],
    step: Step | None = None,
    seats: Collection[Seat] = (),
) -> RestorePlan:
    """Order the copies a seat can restore from.

    Args:
      inventory: the copies known.
      seat: who restores.
      node: the node it is on.
      servers: the byte server of each node that has one.
      step: the step all ranks agreed on; None for the newest complete one.
      seats: the seats of a sharded state, as in `Inventory.newest_complete`. Then a seat can
        only use copies of its own part; replicated state can use any.

    Raises:
      IntegrityError: no snapshot is complete, or no copy of the step suits this seat.
    """
    if step is None:
        newest = inventory.newest_complete(seats)
        if newest is None:
            raise IntegrityError(
                f"no snapshot is complete among {len(inventory.copies)} known copies"
            )
        step = newest[1]
    suitable = [c for c in inventory.at(step) if not seats or c.seat == seat]
    if not suitable:
        raise IntegrityError(
            f"no copy of step {step} is known for seat {seat}; known are steps "
            f"{sorted({c.step for c in inventory.copies})}"
        )
    sources, unreachable = list[Source](), list[Copy]()
    for copy in suitable:
        local = copy.node == node
        if copy.tier is not Tier.ARENA or not (local or copy.node in servers):
            unreachable.append(copy)
        else:
            sources.append(Source(copy=copy, server=None if local else servers[copy.node]))
    sources.sort(
        key=lambda s: (
            -s.copy.generation,
            s.server is not None,
            s.copy.seat != seat,
            # Seats begin at different servers, so that many joiners do not queue at one.
            (s.copy.node - node) % (1 + max(c.node for c in suitable)),
            s.copy.seat,
        )
    )
    return RestorePlan(step=step, sources=tuple(sources), unreachable=tuple(unreachable))


def execute(
    plan: RestorePlan, state: ProtectedState, *, secret: bytes = b"", timeout_s: float = 10.0
) -> Restored:
    """Load the first source of the plan that is whole. Blocks.

    Args:
      plan: where from.
      state: what to load into, in place.
      secret: the job's, for byte servers.
      timeout_s: the longest silence of a byte server.

    Raises:
      IntegrityError: no source was whole; the message says what was wrong with each. The state
        may be partly loaded and must not be trained on.
      StateChanged: the snapshot is of another model. The state is unchanged.
    """
    failures = list[tuple[Source, str]]()
    for source in plan.sources:
        start = time.monotonic()
        try:
            moved = _load(source, state, secret, timeout_s)
        except (IntegrityError, WireError, OSError) as error:
            failures.append((source, str(error)))
            continue
        return Restored(
            source=source,
            step=plan.step,
            generation=source.copy.generation,
            bytes=moved,
            seconds=time.monotonic() - start,
            failures=tuple(failures),
        )
    tried = "; ".join(f"{source}: {why}" for source, why in failures) or "there was none to try"
    raise IntegrityError(
        f"step {plan.step} cannot be restored from any of {len(plan.sources)} copies ({tried}). "
        f"{len(plan.unreachable)} more are out of reach. Choose an older step"
    )


def _load(source: Source, state: ProtectedState, secret: bytes, timeout_s: float) -> int:
    copy = source.copy
    if source.server is None:
        with Arena.open(Path(copy.path)) as arena:
            head = arena.head(arena.find(copy.step, copy.generation))
            state.load(head.layout, arena.blocks(head), head.small)
            return head.layout.total_bytes
    with fetch(
        source.server,
        secret,
        Path(copy.path).name,
        copy.step,
        copy.generation,
        timeout_s=timeout_s,
    ) as remote:
        state.load(remote.head.layout, remote.blocks(), remote.head.small)
        return remote.head.layout.total_bytes
