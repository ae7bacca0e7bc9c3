"""Mend: the parts of a node that were lost, or that rotted, computed from the other nodes.

The node that lost them pulls what it needs. A shard that fails its digest counts as lost, like
one whose node is gone, and others take its place; what comes out is checked against the digests
that were published with the parity, before anybody may load it.
"""

import logging
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from ftkit.checkpoint.arena import Arena
from ftkit.checkpoint.parity.buffer import ParityHead
from ftkit.checkpoint.parity.combine import Pace, ShardLost, combine
from ftkit.checkpoint.parity.parts import find_part
from ftkit.checkpoint.parity.rounds import Holding, PartRef, StripeSet
from ftkit.checkpoint.parity.streams import Open, Peers, open_shard
from ftkit.checkpoint.provision import ensure_arena
from ftkit.checkpoint.rebuild import shards_to_read
from ftkit.checkpoint.slabs import SLABS, Head, Sealed
from ftkit.checkpoint.stripes import Place, Span
from ftkit.core.errors import IntegrityError, WireError
from ftkit.core.ids import NodeId

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mended:
    """What a rebuild did."""

    parts: tuple[PartRef, ...]
    bytes: int
    """Of the parts."""
    read: int
    """Bytes pulled from other nodes."""
    seconds: float
    damaged: tuple[str, ...]
    """Shards that were corrupt or out of reach, and why."""


def fetch_head(peers: Peers, holding: Holding, node: NodeId) -> ParityHead:
    """What the parity of a round says of the group of `node`, from any of the others.

    Raises:
      IntegrityError: those that answer hold it no longer, or damaged.
      WireError: nobody answers.
    """
    (group,) = (g for g in holding.groups if node in g)
    failures = list[Exception]()
    for other in group:
        if other != node and other in peers.addresses:
            try:
                return peers.parity_head(other, holding.round)
            except (IntegrityError, WireError) as error:
                failures.append(error)
    silent = not failures or any(isinstance(e, WireError) for e in failures)
    kind = WireError if silent else IntegrityError
    told = "; ".join(map(str, failures)) or "all of them are lost"
    raise kind(f"no node of {group} tells of the parity of step {holding.round.step}: {told}")


def missing_parts(directory: Path, head: ParityHead, node: NodeId) -> list[int]:
    """Which of a node's parts of a round are not there, or rotted. Reads all of them."""
    return [
        number
        for number, part in enumerate(head.stripes.parts[node])
        if not _is_good(directory, part)
    ]


def mend(
    directory: Path,
    head: ParityHead,
    node: NodeId,
    missing: Collection[int],
    peers: Peers,
    pace: Pace,
    *,
    slabs: int = SLABS,
    in_place: bool = False,
) -> Mended:
    """Compute a node's missing parts of a round into its arenas. Blocks.

    A part whose head is good is put right in place, and must be pinned; any other gets a slab,
    and an arena when there is none: no rank may have that open for writing.

    Args:
      directory: of the arenas.
      head: of the round's parity, on any node (`fetch_head`).
      node: this one.
      missing: parts of it (`missing_parts`).
      peers: the nodes that live.
      pace: rests between windows.
      slabs: of an arena that is made.
      in_place: whether ranks are writing: then IntegrityError where a slab would be needed.

    Raises:
      IntegrityError: too many shards of a stripe are lost or corrupt; the message says which.
        What was computed by then is not sealed.
      WireError: as IntegrityError, while some node was out of reach: it may come back.
      CapacityError: shared memory is full.
      Superseded: it is not wanted any more.
    """
    start, stripes = time.monotonic(), head.stripes
    lost = dict[Place, Exception]()
    sent, read = Counter[NodeId](), 0
    with ExitStack() as opened:
        parts = {
            number: _Target(directory, head, node, number, slabs, opened, in_place=in_place)
            for number in missing
        }
        opener = open_shard(peers, stripes, head.heads, pace.window_bytes, ranges=pace.ranges)
        for number, stripe in enumerate(stripes.plan.stripes):
            for shard, piece in enumerate(stripe.data):
                if piece.node == node and any(span.part in parts for span in piece.spans):
                    sink = _Spread(piece.spans, {p: t.data for p, t in parts.items()})
                    place = Place(number, shard)
                    read += _compute(stripes, place, sink, opener, lost, sent, peers, pace)
        for part in parts.values():
            part.seal()
    return Mended(
        parts=tuple(stripes.parts[node][number] for number in missing),
        bytes=sum(stripes.parts[node][number].bytes for number in missing),
        read=read,
        seconds=time.monotonic() - start,
        damaged=tuple(
            f"shard {place.shard} of stripe {place.stripe}, node "
            f"{stripes.plan.stripes[place.stripe].nodes[place.shard]}: {why}"
            for place, why in lost.items()
        ),
    )


def _compute(
    stripes: StripeSet,
    place: Place,
    sink: "_Spread",
    opener: Open,
    lost: dict[Place, Exception],
    sent: Counter[NodeId],
    peers: Peers,
    pace: Pace,
) -> int:
    """Compute one piece; what turns out to be bad is added to `lost`, and others are read."""
    stripe = stripes.plan.stripes[place.stripe]
    while True:
        usable = [
            shard
            for shard, node in enumerate(stripe.nodes)
            if node in peers.addresses and Place(place.stripe, shard) not in lost
        ]
        try:
            sources = shards_to_read(stripe, place.shard, usable, sent)
        except IntegrityError as error:
            told = "".join(f"; {why}" for p, why in lost.items() if p.stripe == place.stripe)
            if any(isinstance(why.__cause__, WireError | OSError) for why in lost.values()):
                raise WireError(f"{error}{told}") from error
            raise IntegrityError(f"{error}{told}") from error
        try:
            count = combine(place.stripe, stripe, sources, {place.shard: sink}, opener, pace)
        except ShardLost as error:
            logger.warning("a shard counts as lost: %s", error)
            lost[error.place] = error
            continue
        for shard in sources:
            sent[stripe.nodes[shard]] += stripe.shard_bytes(shard)
        return count


class _Target:
    """A part that is being put together, in its slab."""

    def __init__(
        self,
        directory: Path,
        head: ParityHead,
        node: NodeId,
        number: int,
        slabs: int,
        opened: ExitStack,
        *,
        in_place: bool,
    ) -> None:
        """Begin to put it together; the arena is open until `opened` is closed."""
        part, raw = head.stripes.parts[node][number], head.heads[node][number]
        self._head = Head.parse(raw)
        path = directory / part.arena
        if self._head.sealed.data_bytes != part.bytes:
            raise IntegrityError(f"the head of {part.arena} is of another part")
        sealed = find_part(directory, part)
        self._copy = None
        if sealed == self._head.sealed and _head_is_good(path, sealed):
            arena = opened.enter_context(Arena.open(path, writable=True))
            self.data = opened.enter_context(arena.data_to_mend(sealed))
            return
        if in_place:
            raise IntegrityError(
                f"{part.arena} on node {node} has no good head of step {part.step}"
            )
        arena = opened.enter_context(
            ensure_arena(
                path,
                self._head.layout,
                # Pages for parts of this size; `reserve` has them for this one in any case.
                replicas=max(1, self._head.layout.total_bytes // max(1, part.bytes)),
                chunk_bytes=part.chunk_bytes,
                slabs=slabs,
            )
        )
        self._copy = arena.adopt(raw)
        self._copy.reserve()
        self.data = opened.enter_context(self._copy.data.data)

    def seal(self) -> None:
        """Check every chunk, then declare the part whole."""
        size = self._head.sealed.chunk_bytes
        for chunk in range(len(self._head.digests)):
            self._head.check(chunk, self.data[chunk * size : (chunk + 1) * size])
        if self._copy is not None:
            self._copy.seal()


class _Spread:
    """A sink that distributes a piece over the parts it was cut from, where they are wanted."""

    def __init__(self, spans: Sequence[Span], parts: Mapping[int, memoryview]) -> None:
        self._spans, self._parts = spans, parts
        self._scratch = memoryview(bytearray())

    def window(self, at: int, count: int) -> memoryview:
        if len(self._scratch) < count:
            self._scratch = memoryview(bytearray(count))
        return self._scratch[:count]

    def filled(self, at: int, count: int) -> None:
        first = 0
        for span in self._spans:
            low, high = max(at, first), min(at + count, first + span.count)
            if low < high and span.part in self._parts:
                to = span.at + low - first
                self._parts[span.part][to : to + high - low] = self._scratch[low - at : high - at]
            first += span.count


def _is_good(directory: Path, part: PartRef) -> bool:
    sealed = find_part(directory, part)
    if sealed is None:
        return False
    try:
        with Arena.open(directory / part.arena) as arena:
            arena.verify(sealed)
    except (OSError, IntegrityError):
        return False
    return True


def _head_is_good(path: Path, sealed: Sealed) -> bool:
    try:
        with Arena.open(path) as arena:
            arena.head(sealed)
    except (OSError, IntegrityError):
        return False
    return True
