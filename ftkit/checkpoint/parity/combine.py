"""Combine: shards of a stripe computed from others as they arrive, a window at a time."""

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Protocol

from ftkit.checkpoint.erasure import Codec
from ftkit.checkpoint.fetch import Ranges
from ftkit.checkpoint.gate import GATED_BYTES, Gate
from ftkit.checkpoint.lines import ByteLine
from ftkit.checkpoint.parity.feed import Feed
from ftkit.checkpoint.parity.streams import RANGE_BYTES, Open, Stream
from ftkit.checkpoint.stripes import Place, Stripe
from ftkit.core.errors import FtkitError, IntegrityError, WireError

#: Niceness of whoever computes parity: training and communication go first.
NICE = 10

#: Of the time that parity takes, at most this share is work; the rest belongs to others.
SHARE = 0.5

#: A byte of a shard is received, read to be combined, and the sum read and written.
TOUCHES_OF_PARITY = 4.0

#: The longest rest at once, so that an end is noticed soon.
REST_S = 0.2


class ShardLost(IntegrityError):
    """A shard is corrupt or out of reach; `place` says which."""

    def __init__(self, place: Place, reason: Exception) -> None:
        super().__init__(str(reason))
        self.place = place


class Superseded(FtkitError):
    """The work is not wanted any more."""


class Sink(Protocol):
    """Where a computed shard goes, a window at a time and in order."""

    def window(self, at: int, count: int) -> memoryview:
        """Writable memory for these bytes of the shard."""

    def filled(self, at: int, count: int) -> None:
        """They are there. May raise; the computation ends then."""


class InPlace:
    """A sink that is the shard's own memory."""

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory

    def window(self, at: int, count: int) -> memoryview:
        return self._memory[at : at + count]

    def filled(self, at: int, count: int) -> None:
        """Nothing is left to do."""


class Pace:
    """Keeps work from taking more than its share of the time, or its bytes out of training's way.

    One thread's object.
    """

    def __init__(
        self,
        wanted: Callable[[], bool] = lambda: True,
        *,
        share: float = SHARE,
        gate: Gate | None = None,
        clock: Callable[[], float] = time.monotonic,
        rest: Callable[[float], None] = time.sleep,
    ) -> None:
        """Begin to work now.

        Args:
          wanted: whether the work is still to be done; asked between two windows.
          share: of the time, that work may take; 1 for as fast as can be.
          gate: asked before bytes travel, and enough by itself; None for no such thing.
          clock: seconds.
          rest: sleeps.
        """
        self._wanted, self._share = wanted, share
        self._clock, self._rest = clock, rest
        self._feed: Feed | None = None
        if gate is not None:
            self._feed = Feed(
                gate, touches=TOUCHES_OF_PARITY, check=self._check, clock=clock, rest=rest
            )
        self._since = clock()

    @property
    def window_bytes(self) -> int:
        """Of a shard, so much is worked on at once: less where it comes in pieces."""
        return RANGE_BYTES if self._feed is None else GATED_BYTES

    @property
    def ranges(self) -> Ranges:
        """How the bytes of shards are read; through the gate it raises Superseded, as `pause`."""
        return ByteLine.ranges if self._feed is None else self._feed.ranges

    def give_up(self) -> None:
        """Nobody reads on; may be called at any time."""
        if self._feed is not None:
            self._feed.give_up()

    def pause(self) -> None:
        """After some work: rest as long as its share asks for.

        Raises:
          Superseded: it is not wanted any more.
        """
        self._check()
        if self._feed is None and self._share < 1:
            spent = self._clock() - self._since
            self._rest(min(REST_S, spent * (1 - self._share) / self._share))
        self._since = self._clock()

    def _check(self) -> None:
        if not self._wanted():
            raise Superseded("something newer has taken its place")


def combine(
    number: int,
    stripe: Stripe,
    sources: Sequence[int],
    outputs: Mapping[int, Sink],
    open_shard: Open,
    pace: Pace,
) -> int:
    """Compute shards of a stripe from others. Blocks.

    Args:
      number: the stripe's.
      stripe: the stripe.
      sources: what to read: as many shards with bytes as there are pieces with bytes.
      outputs: where each result goes.
      open_shard: how to read a shard.
      pace: rests between windows.

    Returns:
      The bytes read.

    Raises:
      ShardLost: a source turned out to be corrupt or out of reach; the outputs hold anything.
      Superseded: it is not wanted any more; likewise.
    """
    if not stripe.length:
        return 0
    k = len(stripe.data)
    codec = Codec(k, len(stripe.parity))
    window = min(pace.window_bytes, stripe.length)
    empty = {i: memoryview(b"") for i, piece in enumerate(stripe.data) if not piece.count}
    read = 0
    with ExitStack() as opened:
        opened.callback(pace.give_up)
        streams = dict[int, Stream]()
        for shard in sources:
            with _blamed(Place(number, shard)):
                streams[shard] = open_shard(Place(number, shard), opened)
        for at in range(0, stripe.length, window):
            given = dict[int, memoryview](empty)
            for shard, stream in streams.items():
                with _blamed(Place(number, shard)):
                    given[shard] = stream.take(_within(stripe.shard_bytes(shard), at, window))
                read += len(given[shard])
            counts = {i: _within(stripe.shard_bytes(i), at, window) for i in outputs}
            codec.rebuild(given, {i: out.window(at, counts[i]) for i, out in outputs.items()})
            for i, out in outputs.items():
                out.filled(at, counts[i])
            pace.pause()
    return read


@contextmanager
def _blamed(place: Place) -> Iterator[None]:
    """What goes wrong in here is the fault of this shard."""
    try:
        yield
    except (IntegrityError, WireError, OSError) as error:
        raise ShardLost(place, error) from error


def _within(count: int, at: int, window: int) -> int:
    """Bytes of a shard in the window at `at`."""
    return max(0, min(window, count - at))


def be_nice() -> None:
    """Let the kernel prefer others to this thread. Linux counts niceness by thread."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
