"""Flows: chunks on their way between ranks, in pieces, consumed as they come.

    produce / Inflow     from one rank to one that folds it
    Handout / take_in    the folded pieces, from their owner to everybody

A piece comes through the socket into scratch memory, or as an offer. An offered piece is folded
where it lies, if it is resident there or was staged, and is fetched first otherwise. The
programs are the same for all of these.
"""

from collections import deque
from collections.abc import Generator, Sequence
from typing import NamedTuple, cast

from ftkit.collectives.arithmetic import Bytes
from ftkit.collectives.frames import Offer
from ftkit.collectives.link import Ticket
from ftkit.collectives.op import Op, Wait
from ftkit.collectives.resident import find
from ftkit.core.errors import ProtocolError

_AHEAD = 2
#: The same of pieces that are sent: what comes before it is awaited is copied once more.
_SENT_AHEAD = 4
#: Pieces of a chunk that are staged before the first of them has been read.
_SHOWN_AHEAD = 2


def pieces_of(chunk: Bytes, step: int) -> list[Bytes]:
    """The chunk in pieces of `step` bytes; the last may be shorter."""
    return [chunk[at : at + step] for at in range(0, chunk.size, step)]


def produce(op: Op, target: int, chunk: Bytes, tag: int, *, answered: bool = False) -> list[Ticket]:
    """Send `chunk` to an `Inflow` at `target`.

    The memory is in use until all tickets are done, and, where the chunk is `answered`, until
    the target's folded chunk has come: it says that the target has read ours.
    """
    if not chunk.size:
        return []
    pieces = pieces_of(chunk, op.piece)
    if not op.pushes(target, chunk.size):
        return [_Outflow(op, target, pieces, tag, answered=answered).sent]
    return [op.send(target, piece, tag=tag, part=i) for i, piece in enumerate(pieces)]


class _Outflow:
    """Offers the pieces: resident ones all at once, staged ones a few ahead of the reader."""

    def __init__(
        self, op: Op, target: int, pieces: Sequence[Bytes], tag: int, *, answered: bool
    ) -> None:
        self._op = op
        self._target = target
        self._tag = tag
        self._left = deque(enumerate(pieces))
        self._resident = is_resident(pieces)
        self._answered = answered
        self._open = 0
        self._in_use: list[Ticket] = []
        self.sent = Ticket()
        """Done when the memory of the chunk may change."""
        self._go_on()

    def ticket_done(self) -> None:
        """The target has read up to here."""
        self._open -= 1
        self._go_on()

    def _go_on(self) -> None:
        while self._left and (self._resident or self._open < _SHOWN_AHEAD):
            part, piece = self._left.popleft()
            told = is_told(last=not self._left, resident=self._resident)
            tickets, copied = self._op.lend(
                [self._target],
                piece,
                tag=self._tag,
                part=part,
                told=told and not (self._resident and self._answered),
            )
            for ticket in tickets:
                ticket.owner = self
                self._open += 1
            if not copied:
                self._in_use += tickets
        if not self._left and all(ticket.done for ticket in self._in_use):
            self.sent.complete()


def is_resident(pieces: Sequence[Bytes]) -> bool:
    """Whether peers can read all of these pieces of one chunk in place."""
    return all(find(piece.ctypes.data, piece.size) is not None for piece in pieces)


def is_told(*, last: bool, resident: bool) -> bool:
    """Whether readers of this piece tell its owner.

    Of what is read in place the owner must know the end. Of copies it must know how far the
    readers are while there is more to copy.
    """
    return last if resident else not last


class Piece(NamedTuple):
    """A piece that has come, to be given back to its flow."""

    view: Bytes
    """To be read only."""
    scratch: Bytes | None
    number: int
    offer: Offer | None


class Inflow:
    """The consuming end of `produce`."""

    def __init__(self, op: Op, source: int, nbytes: int, tag: int) -> None:
        """Expect `nbytes` from rank `source`."""
        self._op = op
        self._source = source
        self._nbytes = nbytes
        self._tag = tag
        self._pulls = bool(nbytes) and op.pulls(source, nbytes)
        self._ahead: deque[tuple[Ticket, Bytes | None]] = deque()
        self._posted = 0
        for _ in range(_AHEAD if self._pulls else _SENT_AHEAD):
            self._post()

    def piece(self, index: int) -> Generator[Wait, None, Piece]:
        """The next piece, which is number `index`. Give it back with `done`."""
        length = self._length(index)
        ticket, buffer = self._ahead.popleft()
        if not ticket.done:
            yield ticket
        if buffer is not None:
            return Piece(buffer[:length], buffer, index, None)
        offer = cast("Offer", ticket.data)
        if offer.length != length:
            raise ProtocolError(
                f"rank {self._source} offered {offer.length} bytes, {length} were expected: the "
                "ranks disagree about the operation or its shape"
            )
        view = self._op.look(self._source, offer)
        if view is not None:
            return Piece(view, None, index, offer)
        buffer = self._op.scratch()
        self._op.fetch(self._source, offer, buffer[:length])
        return Piece(buffer[:length], buffer, index, offer)

    def done(self, piece: Piece) -> None:
        """The piece was used up: check that it held, release the producer."""
        if piece.scratch is not None:
            self._op.release(piece.scratch)
        if piece.offer is not None:
            self._op.fetched(self._source, piece.offer, tag=self._tag, part=piece.number)
        self._post()

    def _length(self, index: int) -> int:
        return min(self._op.piece, self._nbytes - index * self._op.piece)

    def _post(self) -> None:
        length = self._length(self._posted)
        if length <= 0:
            return
        if self._pulls:
            ticket = self._op.offered(self._source, tag=self._tag, part=self._posted)
            self._ahead.append((ticket, None))
        else:
            buffer = self._op.scratch()
            ticket = self._op.recv(self._source, buffer[:length], tag=self._tag, part=self._posted)
            self._ahead.append((ticket, buffer))
        self._posted += 1


class Handout:
    """Hands the pieces of our chunk round as they become final; `take_in` is the other end."""

    def __init__(self, op: Op, chunk: Bytes, tag: int, *, copies: bool = False) -> None:
        """Hand `chunk` to all others; with `copies`, so that it may change at once."""
        self._op = op
        self._tag = tag
        self._last = -(-chunk.size // op.piece) - 1
        self._resident = not copies and is_resident([chunk])
        self._copies = copies
        self._pushed = [rank for rank in op.others() if op.pushes(rank, chunk.size)]
        self._lent = [rank for rank in op.others() if rank not in self._pushed]
        self._unread: deque[list[Ticket]] = deque()
        self.in_use: list[Ticket] = []
        """When all are done the memory of the chunk may change."""

    def hand(self, index: int, piece: Bytes) -> Generator[Wait, None, None]:
        """Piece number `index` is final."""
        if self._pushed:
            sent = piece.copy() if self._copies else piece
            self.in_use += [
                self._op.send(rank, sent, tag=self._tag, part=index) for rank in self._pushed
            ]
        if not self._lent:
            return
        if len(self._unread) >= _SHOWN_AHEAD:
            yield self._unread.popleft()
        tickets, copied = self._op.lend(
            self._lent,
            piece,
            tag=self._tag,
            part=index,
            told=is_told(last=index == self._last, resident=self._resident),
            copied=self._copies,
        )
        if not copied:
            self.in_use += tickets
        elif tickets:
            self._unread.append(tickets)


def take_in(op: Op, chunks: Sequence[Bytes], tag: int) -> list[Ticket]:
    """Await everybody's handed out chunk, in place. Post it before the first `hand`.

    A piece overwrites ours when its owner has folded it, and so has read ours.
    """
    return [
        op.recv(rank, piece, tag=tag, part=i)
        for rank in op.others()
        for i, piece in enumerate(pieces_of(chunks[rank], op.piece))
    ]
