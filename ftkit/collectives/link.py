"""Link: one authenticated, non-blocking connection to one member, framed both ways.

Owned by the communication thread; no method may be called from another. What to do with a
payload is asked of a `Router`; the link itself only keeps the streams in frame:

* outgoing, small control frames overtake bulk messages between segments;
* incoming, bytes go straight into the memory the router names for them.
"""

import socket
from collections import deque
from typing import Protocol

from ftkit.collectives.cma import CmaPeer
from ftkit.collectives.frames import HEADER_BYTES, SEGMENT_BYTES_MAX, Header, Kind, pack, parse
from ftkit.core.errors import ProtocolError, WireError
from ftkit.core.ids import MemberId

_STAGE_BYTES = 32 << 10
#: Work done on one link before the others get their turn.
_READS_A_TURN = 8
_FRAMES_A_TURN = 8


class Ticket:
    """One transfer an operation waits for. `owner` is told when it is done."""

    __slots__ = ("data", "done", "owner", "source")

    def __init__(self) -> None:
        self.done = False
        self.data: object = None
        self.source = -1
        self.owner: TicketOwner | None = None

    def complete(self) -> None:
        """Mark done and tell the owner, once."""
        if not self.done:
            self.done = True
            if self.owner is not None:
                self.owner.ticket_done()


class TicketOwner(Protocol):
    """Whoever waits for tickets."""

    def ticket_done(self) -> None:
        """One of the awaited tickets is done."""


class Router(Protocol):
    """Decides where incoming payloads go."""

    def place(self, link: "Link", header: Header) -> tuple[memoryview, object] | None:
        """Memory for this frame's payload and a token; None to stop reading (park).

        Raises ProtocolError when the frame makes no sense.
        """

    def arrived(self, link: "Link", header: Header, view: memoryview, token: object) -> None:
        """The payload is complete in `view`. Raises ProtocolError for bad content."""


class Outbound:
    """A message on its way out, cut into frames as it goes."""

    __slots__ = ("header", "offset", "ticket", "view")

    def __init__(self, header: Header, view: memoryview, ticket: Ticket | None) -> None:
        self.header = header
        self.view = view
        self.offset = 0
        self.ticket = ticket


class Link:
    """See the module. `sock` belongs to the link from here on."""

    def __init__(
        self,
        sock: socket.socket,
        peer: MemberId,
        *,
        cma: CmaPeer | None,
        can_offer: bool,
        segment_bytes: int,
    ) -> None:
        """Take over a connected socket.

        Args:
          sock: authenticated; switched to non-blocking here.
          peer: who is at the other end; frames that claim another source are refused.
          cma: reads the peer's memory, where that works.
          can_offer: whether the peer can read ours.
          segment_bytes: size of a frame's payload.
        """
        sock.setblocking(False)
        self.sock = sock
        self.fd = sock.fileno()
        self.peer = peer
        self.cma = cma
        self.can_offer = can_offer
        self.said_bye = False
        self.parked = False
        self.force = False
        """Read on whatever the bound on early bytes says: the peer has closed its side."""
        self.early_bytes = 0
        self.awaited = 0
        """Receives and acknowledgements that are posted and still open on this link."""
        self.events = 0
        self._segment = segment_bytes
        self._urgent: deque[Outbound] = deque()
        self._bulk: deque[Outbound] = deque()
        self._current: Outbound | None = None
        self._out: list[memoryview] = []
        self._stage = bytearray(_STAGE_BYTES)
        self._stage_view = memoryview(self._stage)
        self._start = self._end = 0
        self._header: Header | None = None
        self._sink: memoryview | None = None
        self._token: object = None
        self._filled = 0

    # -- outgoing ---------------------------------------------------------------------

    @property
    def has_output(self) -> bool:
        return bool(self._out or self._urgent or self._bulk)

    @property
    def owes(self) -> bool:
        """Whether payload of an operation still waits to be sent."""
        waiting = [*self._urgent, *self._bulk]
        if self._current is not None:
            waiting.append(self._current)
        return any(m.header.kind in (Kind.DATA, Kind.OFFER) for m in waiting)

    def queue(
        self, header: Header, view: memoryview, ticket: Ticket | None, *, urgent: bool
    ) -> None:
        """Append a message. `view` must stay untouched until the ticket is done."""
        (self._urgent if urgent else self._bulk).append(Outbound(header, view, ticket))

    def flush(self) -> None:
        """Send what the kernel takes now, up to a turn. Raises OSError: the peer is gone."""
        for _ in range(_FRAMES_A_TURN):
            if not self._out and not self._next_frame():
                return
            try:
                sent = self.sock.sendmsg(self._out)
            except (BlockingIOError, InterruptedError):
                return
            while self._out and sent >= len(self._out[0]):
                sent -= len(self._out.pop(0))
            if self._out:
                self._out[0] = self._out[0][sent:]
                return
            self._frame_sent()

    def drop_output(self, generation: int) -> int:
        """Forget messages of `generation` and older; returns how many.

        A frame that was begun must be finished, or the peer would lose the frame boundaries.
        Its rest is copied, so that its owner may reuse the memory at once and the peer can
        never receive a mixture.
        """
        dropped = 0
        for queue in (self._urgent, self._bulk):
            kept = [m for m in queue if not _stale(m.header, generation)]
            dropped += len(queue) - len(kept)
            queue.clear()
            queue.extend(kept)
        current = self._current
        if current is not None and _stale(current.header, generation):
            dropped += 1
            self._out = [memoryview(bytes(part)) for part in self._out]
            current.ticket = None
            current.offset = len(current.view)
        return dropped

    def _next_frame(self) -> bool:
        queue = self._urgent or self._bulk
        if not queue:
            return False
        message = queue.popleft()
        length = min(self._segment, len(message.view) - message.offset)
        header = message.header._replace(offset=message.offset, length=length)
        self._out = [memoryview(pack(header))]
        if length:
            self._out.append(message.view[message.offset : message.offset + length])
        message.offset += length
        self._current = message
        return True

    def _frame_sent(self) -> None:
        message, self._current = self._current, None
        assert message is not None, "a frame belongs to a message"
        if message.offset < len(message.view):
            # Back to the front: between its segments only urgent frames may slip in.
            self._bulk.appendleft(message)
        elif message.ticket is not None and message.header.kind is not Kind.OFFER:
            # An offer is done when it is acknowledged, not when it is sent.
            message.ticket.complete()

    # -- incoming ---------------------------------------------------------------------

    def discard_input(self, generation: int) -> None:
        """Let a payload of `generation` that is half here run into the void."""
        if self._header is not None and self._sink is not None and _stale(self._header, generation):
            self._sink = memoryview(bytearray(len(self._sink)))
            self._token = None

    def receive(self, router: Router) -> None:
        """Read what is there, up to a turn.

        Raises:
          ProtocolError: the stream is not ours, or out of frame.
          WireError: the peer is gone (end of stream).
          OSError: the connection broke.
        """
        for _ in range(_READS_A_TURN):
            if not self._digest(router):
                return
            header, sink = self._header, self._sink
            if header is not None and sink is not None:
                target = sink[self._filled :]
            else:
                if self._start:
                    rest = self._end - self._start
                    self._stage[:rest] = self._stage[self._start : self._end]
                    self._start, self._end = 0, rest
                target = self._stage_view[self._end :]
            try:
                count = self.sock.recv_into(target)
            except (BlockingIOError, InterruptedError):
                return
            if count == 0:
                raise WireError(f"member {self.peer} closed its connection")
            if header is not None and sink is not None:
                self._filled += count
            else:
                self._end += count
            if count < len(target):
                break  # there was no more; asking again would only be told so
        self._digest(router)

    def _digest(self, router: Router) -> bool:
        """Parse what is staged. False when the link is parked."""
        while True:
            header = self._header
            if header is None:
                if self._end - self._start < HEADER_BYTES:
                    return True
                header = parse(self._stage_view, self._start)
                if header.source != self.peer:
                    raise ProtocolError(
                        f"member {self.peer} sent a frame in the name of {header.source}"
                    )
                if header.length > min(self._segment, SEGMENT_BYTES_MAX) and (
                    header.kind is Kind.DATA
                ):
                    raise ProtocolError(
                        f"member {self.peer} sent a segment of {header.length} bytes, "
                        f"{self._segment} were agreed"
                    )
                self._start += HEADER_BYTES
                self._header, self._filled = header, 0
            if self._sink is None:
                placed = router.place(self, header)
                if placed is None:
                    self.parked = True
                    return False
                self._sink, self._token = placed
                self.parked = False
            take = min(header.length - self._filled, self._end - self._start)
            if take > 0:
                self._sink[self._filled : self._filled + take] = self._stage_view[
                    self._start : self._start + take
                ]
                self._start += take
                self._filled += take
            if self._filled < header.length:
                return True
            sink, token = self._sink, self._token
            self._header, self._sink, self._token = None, None, None
            router.arrived(self, header, sink, token)

    @property
    def parked_bytes(self) -> int:
        """What the parked message still lacks, in bytes."""
        return 0 if self._header is None else self._header.total - self._header.offset

    def close(self) -> None:
        """Close the socket; twice is fine."""
        self.sock.close()


def _stale(header: Header, generation: int) -> bool:
    return header.kind in (Kind.DATA, Kind.OFFER, Kind.ACK) and header.generation <= generation
