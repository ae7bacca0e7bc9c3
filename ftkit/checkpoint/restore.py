"""Restore: from an inventory to live tensors, by the nearest parts that prove whole.

`plan` is pure: it orders the parts of one step, own arena first, then other arenas on this
node, then arenas of other nodes through their agents' byte servers. `cover` picks from them
what makes up the whole layout. `execute` loads that, checks every byte, and treats what is
damaged or unreachable as lost: the next parts in line take its place.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ftkit.checkpoint.arena import Arena
from ftkit.checkpoint.layout import StateLayout
from ftkit.checkpoint.open_part import Address, OpenPart, open_part
from ftkit.checkpoint.state import ProtectedState
from ftkit.core.errors import IntegrityError, WireError
from ftkit.core.ids import NodeId, Seat, Step
from ftkit.core.inventory import Copy, Inventory, Tier, covered_layouts


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One part, and how to reach it."""

    copy: Copy
    server: Address | None = None
    """The byte server of the copy's node; None when the file is on this node."""

    def __str__(self) -> str:
        where = "this node" if self.server is None else f"node {self.copy.node}"
        return f"{Path(self.copy.path).name} on {where}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """Bytes `first` to `end` of the layout's data, from one source."""

    source: Source
    first: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RestorePlan:
    """Which step of which layout, and from where, best first."""

    step: Step
    layout: str
    """Digest of the layout."""
    total: int
    """Bytes of its data."""
    sources: tuple[Source, ...]
    unreachable: tuple[Copy, ...] = ()
    """Copies of that step that no known path leads to: other tiers, nodes without a server."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """What `execute` did."""

    step: Step
    layout: StateLayout
    reads: tuple[Read, ...]
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
) -> RestorePlan:
    """Order the parts a seat can restore from.

    Where a job's state is sharded, that is where it has several layouts, it is the one that
    this seat has a part of.

    Args:
      inventory: the copies known.
      seat: who restores.
      node: the node it is on.
      servers: the byte server of each node that has one.
      step: the step all ranks agreed on; None for the newest complete one.

    Raises:
      IntegrityError: no snapshot is complete, or the step is not complete for this seat.
    """
    if step is None:
        newest = inventory.newest_complete()
        if newest is None:
            raise IntegrityError(
                f"no snapshot is complete among {len(inventory.copies)} known copies"
            )
        step = newest[1]
    copies = inventory.at(step)
    layouts = covered_layouts(c.part for c in copies)
    own = [c.part.layout for c in copies if c.seat == seat and c.part.layout in layouts]
    if not own and len(layouts) == 1 and all(c.part.layouts == 1 for c in copies):
        own = list(layouts)
    if not own:
        raise IntegrityError(
            f"step {step} is not complete for seat {seat} among {len(copies)} parts of it; known "
            f"are steps {sorted({c.step for c in inventory.copies})}"
        )
    suitable = [c for c in copies if c.part.layout == own[0]]
    sources, unreachable = list[Source](), list[Copy]()
    for copy in suitable:
        local = copy.node == node
        if copy.tier is not Tier.ARENA or not (local or copy.node in servers):
            unreachable.append(copy)
        else:
            sources.append(Source(copy=copy, server=None if local else servers[copy.node]))
    # Older parts of the same step may be of a history that was given up: the last resort.
    current = inventory.complete().get(step, 0)
    sources.sort(
        key=lambda s: (
            s.copy.generation < current,
            s.server is not None,
            -s.copy.generation,
            s.copy.seat != seat,
            # Seats begin at different servers, so that many joiners do not queue at one.
            (s.copy.node - node) % (1 + max(c.node for c in suitable)),
            s.copy.seat,
        )
    )
    return RestorePlan(
        step=step,
        layout=own[0],
        total=suitable[0].part.total,
        sources=tuple(sources),
        unreachable=tuple(unreachable),
    )


def cover(sources: Sequence[Source], total: int) -> tuple[Read, ...]:
    """What to read from where, so that bytes 0 to `total` are read once, in order; pure.

    Args:
      sources: best first; each gives what no better one has.
      total: bytes of the layout's data.

    Raises:
      IntegrityError: some bytes are in no source.
    """
    reads = list[Read]()
    missing = [(0, total)] if total else []
    for source in sources:
        part, left = source.copy.part, list[tuple[int, int]]()
        for first, end in missing:
            low, high = max(first, part.first), min(end, part.end)
            if low >= high:
                left.append((first, end))
                continue
            reads.append(Read(source=source, first=low, end=high))
            left += [(a, b) for a, b in ((first, low), (high, end)) if a < b]
        missing = left
    if missing:
        raise IntegrityError(f"bytes {missing} of {total} are in none of {len(sources)} parts")
    if not reads and sources:
        return (Read(source=sources[0], first=0, end=0),)
    return tuple(sorted(reads, key=lambda r: r.first))


def execute(
    plan: RestorePlan, state: ProtectedState, *, secret: bytes = b"", timeout_s: float = 10.0
) -> Restored:
    """Load the best sources of the plan that are whole. Blocks.

    Args:
      plan: where from.
      state: what to load into, in place.
      secret: the job's, for byte servers.
      timeout_s: the longest silence of a byte server.

    Raises:
      IntegrityError: what is whole does not make up the snapshot; the message says what was
        wrong with each source. The state may be partly loaded and must not be trained on.
      StateChanged: the snapshot is of another model. The state is unchanged.
    """
    start, left = time.monotonic(), list(plan.sources)
    failures = list[tuple[Source, str]]()
    while True:
        try:
            reads = cover(left, plan.total)
            if not reads:
                raise IntegrityError("there is none to read")
        except IntegrityError as error:
            tried = "".join(f"; {source}: {why}" for source, why in failures)
            raise IntegrityError(
                f"step {plan.step} cannot be restored from any of {len(plan.sources)} copies: "
                f"{error}{tried}. {len(plan.unreachable)} more are out of reach. Choose an older "
                "step"
            ) from error
        try:
            layout = _load(plan, reads, state, secret, timeout_s)
        except _Unusable as error:
            failures.append((error.source, str(error)))
            left.remove(error.source)
            continue
        return Restored(
            step=plan.step,
            layout=layout,
            reads=reads,
            bytes=plan.total,
            seconds=time.monotonic() - start,
            failures=tuple(failures),
        )


def look_ahead(plan: RestorePlan, *, secret: bytes = b"", timeout_s: float = 10.0) -> StateLayout:
    """Read the heads of a plan's parts: layouts are decoded once, pages and servers are warm.

    For who will restore another step soon, while others wait. Blocks; what is damaged or out
    of reach is passed over.

    Returns:
      The layout.

    Raises:
      IntegrityError: not one part can be read.
    """
    layout = None
    for source in plan.sources:
        with suppress(_Unusable), _open(source, secret, timeout_s) as part:
            layout = part.head.layout
    if layout is None:
        raise IntegrityError(f"none of {len(plan.sources)} parts of step {plan.step} can be read")
    return layout


class _Unusable(Exception):
    """One source is damaged or cannot be reached."""

    def __init__(self, source: Source, error: Exception) -> None:
        super().__init__(str(error))
        self.source = source


def _load(
    plan: RestorePlan,
    reads: Sequence[Read],
    state: ProtectedState,
    secret: bytes,
    timeout_s: float,
) -> StateLayout:
    with _open(reads[0].source, secret, timeout_s) as part:
        layout, small = part.head.layout, part.head.small

    def fill(targets: Sequence[memoryview]) -> None:
        for read in reads:
            with _open(read.source, secret, timeout_s) as part:
                if part.head.layout.digest != plan.layout:
                    raise _Unusable(
                        read.source,
                        IntegrityError(
                            f"its layout is {part.head.layout.digest}, not {plan.layout}"
                        ),
                    )
                part.read_into(read.first, read.end, targets)

    state.load_by(layout, fill, small)
    return layout


@contextmanager
def _open(source: Source, secret: bytes, timeout_s: float) -> Iterator[OpenPart]:
    """Open a part. What goes wrong while it is open is its fault: _Unusable.

    A part in an arena of this node whose bytes are not what was sealed is struck from it, so
    that nobody counts on it again.
    """
    copy, path = source.copy, Path(source.copy.path)
    try:
        with open_part(copy, path, source.server, secret, timeout_s=timeout_s) as part:
            yield part
    except (IntegrityError, WireError, OSError) as error:
        if source.server is None and isinstance(error, IntegrityError):
            with suppress(IntegrityError, OSError), Arena.open(path, writable=True) as arena:
                arena.drop(arena.find(copy.step, copy.generation))
        raise _Unusable(source, error) from error
