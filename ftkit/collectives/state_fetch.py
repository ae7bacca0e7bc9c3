"""State fetch: pieces of tensors from whoever holds them, in disjoint ranges.

The plan is pure and the same on all ranks: who wants which bytes goes in, who sends what to
whom comes out. A range is cut into pieces, and each goes to the holder that has least to send
so far. What has arrived is remembered piece by piece, so that a fetch that was cut short by a
death is taken up by those who are left, without what is here already.
"""

import json
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ftkit.collectives.arithmetic import Bytes
from ftkit.collectives.link import Ticket
from ftkit.collectives.op import Op, Program, Wait
from ftkit.core.errors import ProtocolError

#: Small enough to share a tensor out evenly, large enough that a piece costs nothing by itself.
PIECE_BYTES = 4 << 20
#: Receives open at a time. Few, so that most pieces are either whole or not begun when a fetch
#: is cut short; more than one, so that several holders send at once.
WINDOW = 4


class Range(NamedTuple):
    """Bytes `start` to `stop` of a tensor's elements in row-major order."""

    tensor: int
    start: int
    stop: int


class Piece(NamedTuple):
    """One transfer."""

    range: Range
    holder: int
    receiver: int


def pack_wants(wants: Sequence[Range]) -> bytes:
    """What one rank lacks, for `parse_wants`."""
    return json.dumps(wants, separators=(",", ":")).encode()


def parse_wants(data: bytes, sizes: Sequence[int]) -> list[Range]:
    """Read what `pack_wants` wrote; `sizes` are the bytes of each tensor.

    Raises:
      ProtocolError: it is something else, or lies outside the tensors.
    """
    try:
        wants = [Range(int(t), int(a), int(b)) for t, a, b in json.loads(data)]
        good = all(0 <= w.start < w.stop <= sizes[w.tensor] and w.tensor >= 0 for w in wants)
    except (ValueError, TypeError, IndexError) as error:
        raise ProtocolError(f"not a list of ranges: {data[:80]!r}") from error
    if not good:
        raise ProtocolError(f"ranges outside the tensors are wanted: {data[:80]!r}")
    return wants


def share_out(
    wants: Sequence[Sequence[Range]],
    holders: Sequence[Sequence[int]],
    *,
    attempt: int = 0,
    piece_bytes: int = PIECE_BYTES,
) -> list[Piece]:
    """Who sends what to whom.

    Args:
      wants: by receiving rank.
      holders: by tensor, the ranks that have it; none is empty for a tensor that is wanted.
      attempt: from the second attempt on (1), a tensor comes from one holder alone, another
        each time: what several sent was wrong, and nothing tells whose part.
      piece_bytes: the most that one piece has.
    """
    pieces: list[Piece] = []
    load: dict[int, int] = {}
    for receiver, ranges in enumerate(wants):
        for tensor, start, stop in ranges:
            able = holders[tensor]
            if attempt:
                able = [able[(attempt - 1) % len(able)]]
            for at in range(start, stop, piece_bytes):
                end = min(at + piece_bytes, stop)
                holder = min(able, key=lambda rank: (load.get(rank, 0), rank))
                load[holder] = load.get(holder, 0) + end - at
                pieces.append(Piece(Range(tensor, at, end), holder, receiver))
    return pieces


@dataclass(slots=True)
class Fetch:
    """The transfers of one rank, as a program and what became of them."""

    pieces: Sequence[Piece]
    memory: Sequence[Bytes | None]
    """By tensor: its bytes, for those this rank sends or receives."""
    tickets: dict[int, Ticket]

    @classmethod
    def of(cls, pieces: Sequence[Piece], memory: Sequence[Bytes | None]) -> "Fetch":
        """`memory` is read and written until the operation ends."""
        return cls(pieces, memory, {})

    @property
    def program(self) -> Program:
        """All of this rank's transfers; all ranks issue it together."""

        def run(op: Op) -> Generator[Wait, None, None]:
            ours = [(n, p) for n, p in enumerate(self.pieces) if op.rank in (p.holder, p.receiver)]
            sent = [
                op.send(receiver, self._part(span), part=number)
                for number, (span, holder, receiver) in ours
                if op.rank == holder
            ]
            window: deque[Ticket] = deque()
            for number, (span, holder, receiver) in ours:
                if op.rank != receiver:
                    continue
                if len(window) == WINDOW:
                    yield window.popleft()
                ticket = op.recv(holder, self._part(span), part=number)
                self.tickets[number] = ticket
                window.append(ticket)
            yield [*window, *sent]

        return run

    def _part(self, span: Range) -> Bytes:
        memory = self.memory[span.tensor]
        assert memory is not None, "whoever takes part has the memory"
        return memory[span.start : span.stop]

    def arrived(self) -> list[Range]:
        """What has come, whole; also after the operation failed."""
        return [self.pieces[n].range for n, ticket in self.tickets.items() if ticket.done]


def without(wanted: Sequence[Range], arrived: Sequence[Range]) -> list[Range]:
    """What of `wanted` is not in `arrived`."""
    left = list(wanted)
    for gone in arrived:
        kept: list[Range] = []
        for span in left:
            if span.tensor != gone.tensor or gone.stop <= span.start or span.stop <= gone.start:
                kept.append(span)
                continue
            if span.start < gone.start:
                kept.append(span._replace(stop=gone.start))
            if gone.stop < span.stop:
                kept.append(span._replace(start=gone.stop))
        left = kept
    return left
