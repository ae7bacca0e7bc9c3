"""Link: one authenticated, non-blocking connection to one member, framed both ways.

Owned by the communication thread; no method may be called from another. What to do with a
payload is asked of a `Router`; the link itself only keeps the streams in frame:

* outgoing, small control frames overtake bulk messages between segments;
* incoming, bytes go straight into the memory the router names for them.

A link may have further connections to the same member, its *lanes*, for networks that cap a
single one. They share the queue of bulk messages: each takes the next segment when it has
room, so that the faster ones carry more. Every segment says where it belongs, and they may
arrive in any order. Control frames stay on the link itself. What is counted, is counted
there too: a lane's `root`.
"""

import platform
import re
import socket
import time
from collections import deque
from typing import Protocol

from ftkit.collectives.cma import CmaPeer
from ftkit.collectives.frames import HEADER_BYTES, SEGMENT_BYTES_MAX, Header, Kind, pack, parse
from ftkit.collectives.fuse import Fuse
from ftkit.collectives.meter import METERED_BYTES, Flow, SocketMeter
from ftkit.core.errors import ProtocolError, WireError
from ftkit.core.ids import MemberId

_STAGE_BYTES = 32 << 10
#: Work done on one link before the others get their turn.
_READS_A_TURN = 8
_FRAMES_A_TURN = 8
#: Kernels before this one do not tell of a payload that their buffers cannot hold.
_KERNEL_TELLS = (5, 12)
#: A segment that is cut for several lanes is not cut smaller: each frame costs system calls.
_PIECE_BYTES_MIN = 64 << 10


def gathered_bytes_max(kernel: str) -> int:
    """How much of a payload is left to gather in the kernel before it is read; pure.

    Being woken for every few packets costs as much processor time as moving the bytes. At most a frame
    of the usual size, which is also a piece of a reduction. 1: as it comes.
    """
    found = re.match(r"(\d+)\.(\d+)", kernel)
    tells = found is not None and (int(found[1]), int(found[2])) >= _KERNEL_TELLS
    return 1 << 20 if tells else 1


_GATHERED_BYTES_MAX = gathered_bytes_max(platform.release())


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

    __slots__ = ("flying", "header", "offset", "ticket", "view")

    def __init__(self, header: Header, view: memoryview, ticket: Ticket | None) -> None:
        self.header = header
        self.view = view
        self.offset = 0
        self.flying = 0
        """Frames that a lane has begun and not finished."""
        self.ticket = ticket


class Link:
    """See the module. `sock` belongs to the link from here on."""

    def __init__(
        self,
        sock: socket.socket,
        peer: MemberId,
        *,
        process: str = "",
        dialled: bool = False,
        cma: CmaPeer | None,
        can_offer: bool,
        segment_bytes: int,
        fuse: Fuse,
        root: "Link | None" = None,
    ) -> None:
        """Take over a connected socket.

        Args:
          sock: authenticated; switched to non-blocking here.
          peer: who is at the other end; frames that claim another source are refused.
          process: the process that it was when the link came up.
          dialled: whether it was us who opened it.
          cma: reads the peer's memory, where that works.
          can_offer: whether the peer can read ours.
          segment_bytes: size of a frame's payload.
          fuse: burns with what is sent.
          root: the link that this one is a further lane of.
        """
        sock.setblocking(False)
        self.sock = sock
        self.fd = sock.fileno()
        self.peer = peer
        self.process = process
        self.dialled = dialled
        self.made_at = time.monotonic()
        self.cma = cma
        self.can_offer = can_offer
        self.root = root or self
        self.lanes: list[Link] = []
        """All connections to the peer that still stand, this one included; the root's alone."""
        self.root.lanes.append(self)
        self.meter = SocketMeter(sock)
        self.ended = False
        """The peer said on this connection that nothing follows."""
        self.parked = False
        self.force = False
        """Read on whatever the bound on early bytes says: the peer has closed its side."""
        self.early_bytes = 0
        self.awaited = 0
        """Receives and acknowledgements that are posted and still open on this link."""
        self.events = 0
        self._segment = segment_bytes
        self._metered = min(segment_bytes, METERED_BYTES)
        self._fuse = fuse
        self._urgent: deque[Outbound] = deque()
        self._bulk: deque[Outbound] = root._bulk if root else deque()
        self._last: deque[Outbound] = deque()
        self._current: Outbound | None = None
        self._out: list[memoryview] = []
        self._stage = bytearray(_STAGE_BYTES)
        self._stage_view = memoryview(self._stage)
        self._start = self._end = 0
        self._header: Header | None = None
        self._sink: memoryview | None = None
        self._token: object = None
        self._filled = 0
        self._mark = 1
        """Bytes that make the socket readable."""

    # -- outgoing ---------------------------------------------------------------------

    @property
    def has_output(self) -> bool:
        return bool(self._out or self._urgent or self._bulk or self._last)

    @property
    def said_bye(self) -> bool:
        """Whether the peer has left cleanly: it said so on every connection."""
        return all(lane.ended for lane in self.lanes)

    @property
    def flow(self) -> Flow:
        """What went out over all lanes, and how fast."""
        total = Flow(0, 0.0, None)
        for lane in self.lanes:
            total += lane.meter.pace.flow
        return total

    @property
    def windows(self) -> tuple[float, ...]:
        """Rates of the last two windows over all lanes, the newest first."""
        each = zip(*(lane.meter.pace.windows for lane in self.lanes), strict=False)
        return tuple(sum(rates) for rates in each)

    def settle(self) -> None:
        """Bring `flow` up to date."""
        for lane in self.lanes:
            lane.meter.mark(bulk=lane.meter.open, idle=True)

    @property
    def owes(self) -> bool:
        """Whether payload of an operation still waits to be sent."""
        waiting = [*self._urgent, *self._bulk]
        waiting += [lane._current for lane in self.lanes if lane._current is not None]
        return any(m.header.kind in (Kind.DATA, Kind.OFFER) for m in waiting)

    def queue(
        self, header: Header, view: memoryview, ticket: Ticket | None, *, urgent: bool
    ) -> None:
        """Append a message. `view` must stay untouched until the ticket is done."""
        large = len(view) >= self._metered
        for lane in self.lanes:
            if large or lane.meter.open:
                lane.meter.mark(bulk=large, idle=not lane.has_output)
        (self._urgent if urgent else self._bulk).append(Outbound(header, view, ticket))

    def say_goodbye(self, goodbye: Header) -> None:
        """Append a goodbye on every lane, behind all that is queued."""
        for lane in self.lanes:
            lane._last.append(Outbound(goodbye, memoryview(b""), None))

    def flush(self) -> None:
        """Send what the kernel takes now, up to a turn. Raises OSError: the peer is gone."""
        for _ in range(_FRAMES_A_TURN):
            if not self._out and not self._next_frame():
                return
            try:
                if self._fuse.lit:
                    sent = self.sock.sendmsg(self._fuse.short(self._out))
                    self._fuse.burn(sent)
                else:
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
        dropped = sum(lane._drop_current(generation) for lane in self.lanes)
        for queue in (self._urgent, self._bulk):
            kept = [m for m in queue if not _stale(m.header, generation)]
            dropped += len(queue) - len(kept)
            queue.clear()
            queue.extend(kept)
        return dropped

    def _drop_current(self, generation: int) -> int:
        current = self._current
        if current is None or not _stale(current.header, generation):
            return 0
        self._out = [memoryview(bytes(part)) for part in self._out]
        current.ticket = None
        # While more of it is to be sent it stands in the queue, and is counted there.
        return int(current.offset == len(current.view))

    def _next_frame(self) -> bool:
        queue = self._urgent or self._bulk or self._last
        if not queue:
            return False
        message = queue.popleft()
        length = min(self._frame_bytes, len(message.view) - message.offset)
        header = message.header._replace(offset=message.offset, length=length)
        self._out = [memoryview(pack(header))]
        if length:
            self._out.append(message.view[message.offset : message.offset + length])
        message.offset += length
        message.flying += 1
        if message.offset < len(message.view):
            # Back to the front: between its segments only urgent frames may slip in.
            self._bulk.appendleft(message)
        self._current = message
        return True

    def _frame_sent(self) -> None:
        message, self._current = self._current, None
        assert message is not None, "a frame belongs to a message"
        message.flying -= 1
        if message.flying or message.offset < len(message.view):
            return
        if message.ticket is not None and message.header.kind is not Kind.OFFER:
            # An offer is done when it is acknowledged, not when it is sent.
            message.ticket.complete()

    @property
    def _frame_bytes(self) -> int:
        """A segment is cut so that all lanes can carry a piece of it at the same time."""
        lanes = len(self.root.lanes)
        if lanes == 1:
            return self._segment
        return min(self._segment, max(self._segment // lanes, _PIECE_BYTES_MIN))

    # -- incoming ---------------------------------------------------------------------

    def discard_input(self, generation: int) -> None:
        """Let what is half here of `generation` run into the void."""
        for lane in self.lanes:
            lane._discard_payload(generation)

    def _discard_payload(self, generation: int) -> None:
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
        try:
            self._receive(router)
        finally:
            lacking = 0 if self._sink is None else len(self._sink) - self._filled
            self.wake_for(min(max(lacking, 1), _GATHERED_BYTES_MAX))

    def _receive(self, router: Router) -> None:
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

    def wake_for(self, nbytes: int) -> None:
        """Be readable with so many bytes, at the end of the stream, or where buffers hold no more."""
        if nbytes != self._mark:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, nbytes)
            self._mark = nbytes

    @property
    def parked_bytes(self) -> int:
        """What the parked message still lacks, in bytes."""
        return 0 if self._header is None else self._header.total - self._header.offset

    def close(self) -> None:
        """Close the socket; twice is fine."""
        self.sock.close()


def _stale(header: Header, generation: int) -> bool:
    return header.kind in (Kind.DATA, Kind.OFFER, Kind.ACK) and header.generation <= generation
