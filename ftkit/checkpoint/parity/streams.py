"""Streams: the bytes of a shard on another node, in order, each chunk checked before use."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass

from ftkit.checkpoint.chunks import CHUNK_BYTES, chunk_count
from ftkit.checkpoint.fetch import HEAD_BYTES_MAX, Ranges, checked
from ftkit.checkpoint.lines import ByteLine, Lines
from ftkit.checkpoint.parity.buffer import Heads, ParityHead
from ftkit.checkpoint.parity.rounds import PartRef, RoundId, StripeSet
from ftkit.checkpoint.slabs import Head
from ftkit.checkpoint.stripes import Place
from ftkit.core.errors import IntegrityError, WireError
from ftkit.core.ids import NodeId

#: Of a shard, this much travels while as much is used: k + m of them are open at once.
RANGE_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Peers:
    """How to reach the byte servers of the nodes that live."""

    addresses: Mapping[NodeId, tuple[str, int]]
    lines: Lines
    """Kept from one use to the next."""

    def line(self, node: NodeId) -> AbstractContextManager[ByteLine]:
        """A connection for a while. WireError when there is no such node, or it is silent."""
        if node not in self.addresses:
            raise WireError(f"node {node} is lost")
        return self.lines.borrow(self.addresses[node])

    def head_bytes(self, node: NodeId, part: PartRef) -> bytes:
        """The head of a part in an arena, checked.

        Raises:
          IntegrityError: it is not there, or damaged.
          WireError: the node is gone, silent or mad.
        """
        with self.line(node) as line:
            found = bytes(line.read({**_request(part), "op": "head"}, HEAD_BYTES_MAX))
        Head.parse(found)
        return found

    def parity_head(self, node: NodeId, round_: RoundId) -> ParityHead:
        """What a node's parity of a round says of itself; as `head_bytes`."""
        with self.line(node) as line:
            found = line.read({"op": "parity-head", "round": round_}, HEAD_BYTES_MAX)
        head = ParityHead.parse(bytes(found), node)
        if head.stripes.round != round_:
            raise IntegrityError(f"node {node} has overwritten its parity of step {round_.step}")
        return head


class Stream:
    """A shard as one run of bytes, of which the next so many are asked for."""

    def __init__(self, blocks: Iterable[memoryview]) -> None:
        self._blocks = iter(blocks)
        self._left = memoryview(b"")
        self._joined = bytearray()

    def take(self, count: int) -> memoryview:
        """The next `count` bytes, valid until more are taken. Raises what the blocks raise.

        Not copied where they lie in one block.

        Raises:
          IntegrityError: the shard ends before.
        """
        if count and not self._left:
            self._go_on(count)
        if len(self._left) < count:
            return self._join(count)
        found, self._left = self._left[:count], self._left[count:]
        return found

    def _join(self, count: int) -> memoryview:
        if len(self._joined) < count:
            self._joined = bytearray(count)
        out, at = memoryview(self._joined)[:count], 0
        while at < count:
            if not self._left:
                self._go_on(count - at)
            size = min(len(self._left), count - at)
            out[at : at + size] = self._left[:size]
            self._left = self._left[size:]
            at += size
        return out

    def _go_on(self, missing: int) -> None:
        block = next(self._blocks, None)
        if block is None:
            raise IntegrityError(f"a shard ends {missing} bytes too early")
        self._left = block


Open = Callable[[Place, ExitStack], Stream]
"""Begins to read a shard; what it opens is closed with the stack."""


def open_shard(
    peers: Peers,
    stripes: StripeSet,
    heads: Heads,
    range_bytes: int = RANGE_BYTES,
    *,
    ranges: Ranges = ByteLine.ranges,
) -> Open:
    """How shards of a set are read from the nodes that hold them.

    Args:
      peers: the nodes.
      stripes: the set.
      heads: of its parts, checked; what the nodes hold now must be what these say.
      range_bytes: so much is asked for at once.
      ranges: how they are read.

    Returns:
      A function that raises IntegrityError where a shard is not what it was, and WireError or
      OSError where it cannot be reached; so does what is read from its stream.
    """
    read = dict[NodeId, ParityHead]()

    def open_it(place: Place, opened: ExitStack) -> Stream:
        stripe = stripes.plan.stripes[place.stripe]
        node = stripe.nodes[place.shard]
        if place.shard < len(stripe.data):
            line = opened.enter_context(peers.line(node))
            return Stream(_piece(line, stripes, heads, place, range_bytes, ranges))
        if node not in read:
            read[node] = peers.parity_head(node, stripes.round)
        line = opened.enter_context(peers.line(node))
        return Stream(_parity(line, read[node], place, stripe.length, range_bytes, ranges))

    return open_it


def _piece(
    line: ByteLine,
    stripes: StripeSet,
    heads: Heads,
    place: Place,
    range_bytes: int,
    ranges: Ranges,
) -> Iterator[memoryview]:
    piece = stripes.plan.stripes[place.stripe].data[place.shard]
    for span in piece.spans:
        part = stripes.parts[piece.node][span.part]
        chunks = range(
            span.at // part.chunk_bytes, chunk_count(span.at + span.count, part.chunk_bytes)
        )
        # Whatever else has taken its place by now fails its digest.
        head = Head.parse(heads[piece.node][span.part])
        yield from checked(line, _request(part), head, chunks, range_bytes, ranges=ranges)


def _request(part: PartRef) -> dict[str, object]:
    return {"arena": part.arena, "step": part.step, "generation": part.generation}


def _parity(
    line: ByteLine,
    head: ParityHead,
    place: Place,
    length: int,
    range_bytes: int,
    ranges: Ranges,
) -> Iterator[memoryview]:
    request = {"op": "parity-data", "round": head.stripes.round, "place": place}
    chunk = 0
    for data in ranges(line, request, 0, length, range_bytes):
        for at in range(0, len(data), CHUNK_BYTES):
            block = data[at : at + CHUNK_BYTES]
            head.check(place, chunk, block)
            chunk += 1
            yield block
