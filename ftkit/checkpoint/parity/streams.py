"""Streams: the bytes of a shard on another node, in order, each chunk checked before use."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

from ftkit.checkpoint.chunks import CHUNK_BYTES, chunk_count
from ftkit.checkpoint.fetch import HEAD_BYTES_MAX, ByteLine, Remote, fetch
from ftkit.checkpoint.parity.buffer import Heads, ParityHead
from ftkit.checkpoint.parity.rounds import PartRef, RoundId, StripeSet
from ftkit.checkpoint.slabs import PAGE, Sealed
from ftkit.checkpoint.stripes import Place
from ftkit.core.errors import IntegrityError, WireError
from ftkit.core.ids import NodeId

#: Of a shard, this much travels while as much is used: k + m of them are open at once.
RANGE_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Peers:
    """How to reach the byte servers of the nodes that live."""

    addresses: Mapping[NodeId, tuple[str, int]]
    secret: bytes
    timeout_s: float = 10.0

    def line(self, node: NodeId) -> ByteLine:
        """A connection. WireError when there is no such node, or it does not answer."""
        return ByteLine.open(self.address(node), self.secret, timeout_s=self.timeout_s)

    def part(self, node: NodeId, part: PartRef) -> Remote:
        """A part in an arena, for reading; as `fetch`."""
        return fetch(
            self.address(node),
            self.secret,
            part.arena,
            part.step,
            part.generation,
            timeout_s=self.timeout_s,
        )

    def parity_head(self, node: NodeId, round_: RoundId) -> ParityHead:
        """What a node's parity of a round says of itself.

        Raises:
          IntegrityError: it is not there, or damaged.
          WireError: the node is gone, silent or mad.
        """
        line = self.line(node)
        try:
            found = line.read({"op": "parity-head", "round": round_}, HEAD_BYTES_MAX)
        finally:
            line.close()
        head = ParityHead.parse(bytes(found), node)
        if head.stripes.round != round_:
            raise IntegrityError(f"node {node} has overwritten its parity of step {round_.step}")
        return head

    def address(self, node: NodeId) -> tuple[str, int]:
        """Where a node's byte server is. WireError when there is no such node."""
        if node not in self.addresses:
            raise WireError(f"node {node} is lost")
        return self.addresses[node]


class Stream:
    """A shard as one run of bytes, of which the next so many are asked for."""

    def __init__(self, blocks: Iterable[memoryview]) -> None:
        self._blocks = iter(blocks)
        self._left = memoryview(b"")

    def fill(self, out: memoryview) -> None:
        """Read the next `len(out)` bytes. Raises what the blocks raise.

        Raises:
          IntegrityError: the shard ends before.
        """
        at = 0
        while at < len(out):
            if not self._left:
                block = next(self._blocks, None)
                if block is None:
                    raise IntegrityError(f"a shard ends {len(out) - at} bytes too early")
                self._left = block
            count = min(len(self._left), len(out) - at)
            out[at : at + count] = self._left[:count]
            self._left = self._left[count:]
            at += count


Open = Callable[[Place, ExitStack], Stream]
"""Begins to read a shard; what it opens is closed with the stack."""


def open_shard(peers: Peers, stripes: StripeSet, heads: Heads) -> Open:
    """How shards of a set are read from the nodes that hold them.

    Args:
      peers: the nodes.
      stripes: the set.
      heads: of its parts, checked; what the nodes hold now must be what these say.

    Returns:
      A function that raises IntegrityError where a shard is not what it was, and WireError or
      OSError where it cannot be reached; so does what is read from its stream.
    """

    def open_it(place: Place, opened: ExitStack) -> Stream:
        stripe = stripes.plan.stripes[place.stripe]
        node = stripe.nodes[place.shard]
        if place.shard < len(stripe.data):
            return Stream(_piece(peers, stripes, heads, place, opened))
        head = peers.parity_head(node, stripes.round)
        line = peers.line(node)
        opened.callback(line.close)
        return Stream(_parity(line, head, place, stripe.length))

    return open_it


def _piece(
    peers: Peers, stripes: StripeSet, heads: Heads, place: Place, opened: ExitStack
) -> Iterator[memoryview]:
    piece = stripes.plan.stripes[place.stripe].data[place.shard]
    for span in piece.spans:
        part = stripes.parts[piece.node][span.part]
        remote = opened.enter_context(peers.part(piece.node, part))
        if remote.head.sealed != Sealed.from_page(heads[piece.node][span.part][:PAGE]):
            raise IntegrityError(
                f"{part.arena} on node {piece.node} holds another step {part.step}"
            )
        chunks = range(
            span.at // part.chunk_bytes, chunk_count(span.at + span.count, part.chunk_bytes)
        )
        yield from remote.blocks(chunks, range_bytes=RANGE_BYTES)


def _parity(line: ByteLine, head: ParityHead, place: Place, length: int) -> Iterator[memoryview]:
    request = {"op": "parity-data", "round": head.stripes.round, "place": place}
    chunk = 0
    for data in line.ranges(request, 0, length, RANGE_BYTES):
        for at in range(0, len(data), CHUNK_BYTES):
            block = data[at : at + CHUNK_BYTES]
            head.check(place, chunk, block)
            chunk += 1
            yield block
