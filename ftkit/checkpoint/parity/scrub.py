"""Scrub: what a node holds for others, computed again and compared, in idle time."""

from dataclasses import dataclass
from pathlib import Path

from ftkit.checkpoint.chunks import CHUNK_BYTES
from ftkit.checkpoint.parity.buffer import ParityHead, read_data, read_head
from ftkit.checkpoint.parity.combine import combine
from ftkit.checkpoint.parity.holder import Holder
from ftkit.checkpoint.parity.rounds import StripeSet
from ftkit.checkpoint.parity.streams import open_shard
from ftkit.checkpoint.rebuild import shards_to_read
from ftkit.checkpoint.stripes import Place
from ftkit.core.errors import IntegrityError


@dataclass(frozen=True, slots=True)
class Wrong:
    """A parity shard that is not what its data gives."""

    place: Place
    at: int
    """The first byte that is wrong, to a chunk."""
    rotted: bool
    """It does not match its digest. Otherwise it was computed wrongly in the first place."""


def scrub(holder: Holder, stripes: StripeSet) -> list[Wrong]:
    """Compute this node's shards of a round again from the others' data, and compare. Blocks.

    Returns:
      The shards that are wrong, each once.

    Raises:
      ShardLost: another node's data is corrupt or out of reach; its `place` says which.
      IntegrityError: the round is no longer here, or the head of its parity is damaged.
      WireError: a node is out of reach.
      Superseded: the round is not kept any more.
    """
    path = holder.path_of(stripes.round)
    head = ParityHead.parse(read_head(path), holder.node)
    peers = holder.peers()
    pace = holder.make_pace(lambda: holder.is_whole(stripes.round))
    opener = open_shard(
        peers, stripes, holder.heads(stripes, peers), pace.window_bytes, ranges=pace.ranges
    )
    wrong = list[Wrong]()
    for place in head.shards:
        stripe = stripes.plan.stripes[place.stripe]
        sources = shards_to_read(stripe, place.shard, range(len(stripe.data)))
        sink = _Compare(path, head, place)
        combine(place.stripe, stripe, sources, {place.shard: sink}, opener, pace)
        if sink.wrong is not None:
            wrong.append(sink.wrong)
    return wrong


class _Compare:
    """A sink that compares with what is stored."""

    def __init__(self, path: Path, head: ParityHead, place: Place) -> None:
        self._path, self._head, self._place = path, head, place
        self._scratch = memoryview(bytearray())
        self.wrong: Wrong | None = None

    def window(self, at: int, count: int) -> memoryview:
        if len(self._scratch) < count:
            self._scratch = memoryview(bytearray(count))
        return self._scratch[:count]

    def filled(self, at: int, count: int) -> None:
        if self.wrong is not None:
            return
        first, _ = self._head.shards[self._place]
        stored = memoryview(read_data(self._path, first + at, count))
        for low in range(0, count, CHUNK_BYTES):
            chunk = stored[low : low + CHUNK_BYTES]
            if chunk == self._scratch[low : min(low + CHUNK_BYTES, count)]:
                continue
            try:
                self._head.check(self._place, (at + low) // CHUNK_BYTES, chunk)
            except IntegrityError:
                self.wrong = Wrong(self._place, at + low, rotted=True)
            else:
                self.wrong = Wrong(self._place, at + low, rotted=False)
            return
