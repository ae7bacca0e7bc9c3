"""Flows: a chunk on its way from one rank to another, consumed a segment at a time.

Where the consumer can read the producer's memory, the chunk is one offer and the consumer
reads segments as it needs them. Elsewhere it is one message a segment, with a few receives
posted ahead into scratch memory. The consumer's program is the same for both.
"""

from collections import deque
from collections.abc import Generator
from typing import cast

from ftkit.collectives.arithmetic import Bytes
from ftkit.collectives.link import Ticket
from ftkit.collectives.op import Op, Wait
from ftkit.core.errors import ProtocolError

_AHEAD = 2


def produce(op: Op, target: int, chunk: Bytes, tag: int) -> list[Ticket]:
    """Send `chunk` to an `Inflow` at `target`. The memory is in use until all are done."""
    if not chunk.size:
        return []
    if not op.pushes(target, chunk.size):
        return [op.send(target, chunk, tag=tag)]
    step = op.segment
    return [
        op.send(target, chunk[at : at + step], tag=tag, part=at // step)
        for at in range(0, chunk.size, step)
    ]


class Inflow:
    """The consuming end of `produce`."""

    def __init__(self, op: Op, source: int, nbytes: int, tag: int) -> None:
        """Expect `nbytes` from rank `source`."""
        self._op = op
        self._source = source
        self._nbytes = nbytes
        self._tag = tag
        self._pulls = bool(nbytes) and op.pulls(source, nbytes)
        self._ahead: deque[tuple[Ticket, Bytes]] = deque()
        self._posted = 0
        self._offer = op.offered(source, tag=tag) if self._pulls else None
        if not self._pulls:
            for _ in range(_AHEAD):
                self._post()

    def segment(self, index: int) -> Generator[Wait, None, Bytes]:
        """The next segment, in scratch memory that the caller gives back with `done`."""
        start = index * self._op.segment
        length = min(self._op.segment, self._nbytes - start)
        if self._offer is not None:
            if not self._offer.done:
                yield self._offer
            address, offered = cast("tuple[int, int]", self._offer.data)
            if offered != self._nbytes:
                raise ProtocolError(
                    f"rank {self._source} offered {offered} bytes, {self._nbytes} were "
                    "expected: the ranks disagree about the operation or its shape"
                )
            buffer = self._op.scratch()
            self._op.fetch(self._source, address + start, buffer[:length])
            return buffer
        ticket, buffer = self._ahead.popleft()
        if not ticket.done:
            yield ticket
        return buffer

    def done(self, buffer: Bytes) -> None:
        """The segment in `buffer` was used up."""
        self._op.release(buffer)
        if not self._pulls:
            self._post()

    def finish(self) -> None:
        """All segments were used: check that they held, release the producer."""
        if self._pulls:
            self._op.fetched([self._source], tags=[self._tag])

    def _post(self) -> None:
        start = self._posted * self._op.segment
        if start >= self._nbytes:
            return
        length = min(self._op.segment, self._nbytes - start)
        buffer = self._op.scratch()
        ticket = self._op.recv(self._source, buffer[:length], tag=self._tag, part=self._posted)
        self._posted += 1
        self._ahead.append((ticket, buffer))
