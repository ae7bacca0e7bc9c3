"""Engine: the one communication thread of a process, and everything it owns.

One loop over all links: read, run the operations that became ready, fetch a segment of what
peers offered, write. Other threads only hand in commands (`call`) and look at the reason why
a generation stopped (`stopped`).

A *generation* ends in one of three ways, all through `_end_generation`: a fault (a link of
the world broke, a peer said ABORT, somebody called `abort`), an edit to the next world, or
close. Its order matters: first the valid word is withdrawn and what is half sent is copied
(no peer can then read memory that its owner gets back), then peers are told, then handles
fail.
"""

import json
import logging
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from ftkit.collectives import frames
from ftkit.collectives.arithmetic import Bytes, copy, view_of
from ftkit.collectives.channel import Channel
from ftkit.collectives.cma import CmaPeer, ProcessGoneError, ValidWord
from ftkit.collectives.config import CollectivesConfig, Transport
from ftkit.collectives.frames import P2P, Header, Kind
from ftkit.collectives.handle import COMM_THREADS, Handle
from ftkit.collectives.link import Link, Ticket
from ftkit.collectives.mailbox import Inbound, Mailbox
from ftkit.collectives.mesh import Greeted
from ftkit.collectives.op import Key, Op, empty
from ftkit.collectives.ports import OpRecorder
from ftkit.core.errors import FtkitError, GenerationAborted, ProtocolError, WireError
from ftkit.core.ids import Generation, MemberId
from ftkit.core.world import World

logger = logging.getLogger(__name__)

FaultCallback = Callable[[Generation, frozenset[MemberId], str], None]
TellCallback = Callable[[MemberId, bytes], None]

_LAST_WORDS_MAX = 64 << 20
_LAST_READS = 64
_DOUBT_S = 2.0


class _FaultError(Exception):
    """Ends the current generation; caught by the loop."""

    def __init__(self, reason: str, lost: frozenset[MemberId] = frozenset()) -> None:
        super().__init__(reason)
        self.reason = reason
        self.lost = lost


class _DoubtError(Exception):
    """A peer withdrew its memory. Why is on its way: its abort, or the end of its link."""


class _Pull(NamedTuple):
    """An offered message being fetched on behalf of a posted receive."""

    key: Key
    address: int
    into: Bytes
    ticket: Ticket


class Engine:
    """See the module. Public methods say which thread may call them."""

    def __init__(
        self,
        member: MemberId,
        config: CollectivesConfig,
        word: ValidWord,
        world: World,
        *,
        recorder: OpRecorder,
        on_fault: FaultCallback,
        on_tell: TellCallback,
    ) -> None:
        """Start the thread, in `world`, which holds only `member`."""
        self.member = member
        self.config = config
        self.recorder = recorder
        self.world = world
        self.links: dict[MemberId, Link] = {}
        self._word = word
        self._on_fault = on_fault
        self._on_tell = on_tell
        self._mail = Mailbox()
        self._by_fd: dict[int, Link] = {}
        self._dirty: set[Link] = set()
        self._retired: set[MemberId] = set()
        self._channels: dict[int, Channel] = {}
        self._offers: dict[Key, Ticket] = {}
        self._pulls: deque[_Pull] = deque()
        self._anybody: deque[tuple[Op, Ticket]] = deque()
        self._active: set[Op] = set()
        self._ready: deque[Op] = deque()
        self._scratch: list[Bytes] = []
        self._doubt: tuple[float, str] | None = None
        self._void = np.empty(config.segment_bytes, dtype=np.uint8)
        self._early_aborts: dict[int, tuple[frozenset[MemberId], str]] = {}
        # Shared with other threads, under the lock.
        self._lock = threading.Lock()
        self._stopped: tuple[int, str] | None = None
        self._generation = world.generation
        self._closing: str | None = None
        self._commands: deque[Callable[[], None]] = deque()
        self.link_news = threading.Condition()
        """Notified whenever the set of links, or the reason to stop, changes."""
        self._over = False
        self._wake_lock = threading.Lock()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll = select.epoll()
        self._epoll.register(self._wake, select.EPOLLIN)
        self._thread = threading.Thread(target=self._run, name="ftkit-comm", daemon=True)
        self._word.publish(world.generation)
        self._thread.start()

    # -- any thread ---------------------------------------------------------------------

    def call(self, command: Callable[[], None]) -> None:
        """Run `command` soon on the communication thread."""
        self._commands.append(command)
        with self._wake_lock:
            if not self._over:
                os.eventfd_write(self._wake, 1)
                return
        # The thread has ended; what is left only fails handles and closes sockets.
        self._run_commands()

    def submit(self, op: Op) -> None:
        """Start `op`. Called with its channel's lock held."""
        self.call(lambda: self._start(op))

    def stopped(self, generation: Generation) -> str | None:
        """Why operations of `generation` fail at once, or None while it lives."""
        with self._lock:
            if self._closing is not None:
                return self._closing
            if self._stopped is not None and self._stopped[0] >= generation:
                return self._stopped[1]
            if generation != self._generation:
                return f"generation {generation} was replaced by {self._generation}"
            return None

    def stop_reason(self, generation: int) -> str | None:
        """Why `generation` was aborted, also one that has not begun here."""
        with self._lock:
            if self._stopped is not None and self._stopped[0] == generation:
                return self._stopped[1]
            early = self._early_aborts.get(generation)
            return None if early is None else early[1]

    def abort(self, generation: Generation, reason: str) -> None:
        """End `generation`, now or as soon as it begins here. Idempotent, does not block."""
        with self._lock:
            if generation < self._generation:
                return
            if generation == self._generation and self._stopped is None:
                self._stopped = (generation, reason)
            elif generation > self._generation:
                self._early_aborts.setdefault(generation, (frozenset(), reason))
        with self.link_news:
            self.link_news.notify_all()
        self.call(lambda: self._abort(generation, frozenset(), reason))

    def channel(self, id_: int, fixed: tuple[MemberId, ...] | None) -> Handle[Channel]:
        """A new channel, or the one with this id if the members are the same."""
        handle: Handle[Channel] = Handle()

        def create() -> None:
            channel = self._channels.get(id_)
            if channel is None:
                channel = Channel(self, id_, fixed)
                channel.enter(self.world, self.member)
                self._channels[id_] = channel
            handle.finish(channel)

        self.call(create)
        return handle

    def release_channel(self, id_: int) -> None:
        """Forget a channel that will not be used again."""
        self.call(lambda: void(self._channels.pop(id_, None)))

    def enter(self, world: World) -> Handle[list[MemberId]]:
        """Begin the generation of `world`: value [], or the members whose links are missing."""
        handle: Handle[list[MemberId]] = Handle()
        self.call(lambda: self._enter(world, handle))
        return handle

    def add_link(self, greeted: Greeted) -> None:
        """Take over a connection that passed the greeting."""
        with self._lock:
            closing = self._closing is not None
        if closing:
            greeted.sock.close()
            return
        self.call(lambda: self._add_link(greeted))

    def tell(self, member: MemberId, payload: bytes) -> None:
        """Queue a message outside any generation. Dropped when the member is gone."""
        self.call(lambda: self._tell(member, payload))

    def suspend(self, reason: str) -> None:
        """End the current generation quietly: an edit is about to replace it."""
        self.call(lambda: self._end_generation(reason))

    def barrier(self) -> None:
        """Block until all commands given so far were carried out."""
        handle: Handle[None] = Handle()
        self.call(lambda: handle.finish(None))
        handle.wait()

    @property
    def closing(self) -> str | None:
        """Why nothing new is accepted, or None."""
        return self._closing

    def close(self) -> None:
        """Say goodbye, fail what is pending, end the thread. Blocks; twice is fine."""
        with self._lock:
            if self._closing is not None:
                return
            self._closing = "the group was closed"
        self.call(lambda: None)
        self._thread.join()

    @property
    def on_one_host(self) -> bool:
        """Whether all members of the world name the same host: decided alike by all."""
        return self.config.transport is not Transport.TCP and (
            len({member.host for member in self.world.members}) <= 1
        )

    # -- operations (communication thread) ------------------------------------------------

    def ready(self, op: Op) -> None:
        """All that `op` waited for is here."""
        self._ready.append(op)

    def pulls(self, peer: MemberId, nbytes: int) -> bool:
        link = self.links.get(peer)
        return link is not None and link.cma is not None and nbytes >= self.config.cma_bytes_min

    def offers(self, peer: MemberId, nbytes: int) -> bool:
        link = self.links.get(peer)
        return link is not None and link.can_offer and nbytes >= self.config.cma_bytes_min

    def send(self, key: Key, data: Bytes) -> Ticket:
        """Send a message, as an offer or through the socket."""
        ticket = Ticket()
        if key.peer == self.member:
            self._to_self(key, data)
            ticket.complete()
            return ticket
        link = self._link(MemberId(key.peer))
        view = view_of(data)
        if self.offers(link.peer, data.size):
            link.awaited += 1
            self._offers[key] = ticket
            offer = frames.pack_offer(data.ctypes.data, data.size)
            self._queue(link, _header(key, self.member, Kind.OFFER, 16), memoryview(offer), None)
        else:
            link.queue(
                _header(key, self.member, Kind.DATA, data.size),
                view,
                ticket,
                urgent=data.size <= self.config.exchange_bytes_max,
            )
            self._dirty.add(link)
        return ticket

    def post(self, key: Key, into: Bytes | None, *, raw: bool) -> Ticket:
        """Await a message. `raw` awaits an offer and does not fetch it."""
        ticket = Ticket()
        inbound = self._mail.early.pop(key, None)
        if inbound is None:
            if key.peer != self.member:
                link = self._link(MemberId(key.peer))
                link.awaited += 1
                self._unpark(link)
            inbound = Inbound()
            inbound.ticket, inbound.data, inbound.raw = ticket, into, raw
            self._mail.posted[key] = inbound
            return ticket
        known = self.links.get(MemberId(key.peer))
        if known is not None:
            known.early_bytes -= inbound.total
        inbound.ticket, inbound.raw = ticket, raw
        if inbound.offer is not None:
            if known is not None:
                known.awaited += 1
            inbound.data = into
            self._take_offer(key, inbound)
            return ticket
        inbound.target = into
        if inbound.complete:
            inbound.deliver(key)
            return ticket
        link = self._link(MemberId(key.peer))
        link.awaited += 1
        self._mail.posted[key] = inbound
        self._unpark(link)
        return ticket

    def fetch(self, peer: MemberId, address: int, into: Bytes) -> None:
        """Read offered memory now. Ends the generation when the peer is gone."""
        cma = self._reader(peer)
        try:
            cma.read(into.ctypes.data, address, into.size)
        except ProcessGoneError as error:
            raise _FaultError(f"member {peer} is gone: {error}", frozenset({peer})) from error
        except WireError as error:
            raise _DoubtError(f"member {peer} unmapped what it offered: {error}") from error

    def acknowledge(self, keys: Sequence[Key]) -> None:
        """Check that what was fetched still held, then let the offerers go on."""
        for peer in {MemberId(key.peer) for key in keys}:
            self._check_held(peer)
        for key in keys:
            link = self._link(MemberId(key.peer))
            self._queue(link, _header(key, self.member, Kind.ACK, 0), memoryview(b""), None)

    def take_scratch(self) -> Bytes:
        return self._scratch.pop() if self._scratch else empty(self.config.segment_bytes)

    def give_scratch(self, *buffers: Bytes) -> None:
        if len(self._scratch) < 32:
            self._scratch.extend(buffers)

    def from_anybody(self, op: Op) -> Ticket:
        """The first unclaimed p2p message with the tag of `op`: `ticket.data` is its Key."""
        ticket = Ticket()
        self._anybody.append((op, ticket))
        found = self._mail.early_matching(lambda key: _for_anybody(op, key))
        if found is not None:
            self._claim(found)
        for member in op.members:
            link = self.links.get(member)
            if link is not None:
                self._unpark(link)
        return ticket

    # -- the loop ---------------------------------------------------------------------------

    def _run(self) -> None:
        COMM_THREADS.add(threading.get_ident())
        np.seterr(all="ignore")  # an overflow belongs to the user's numbers, not to us
        try:
            while self._closing is None:
                self._turn()
            self._farewell()
        except Exception as error:
            # A bug here must not leave anybody waiting for ever.
            logger.exception("the communication thread failed")
            with self._lock:
                self._closing = f"the communication thread failed: {error!r}"
            self._end_generation(self._closing)
        finally:
            COMM_THREADS.discard(threading.get_ident())
            for link in list(self.links.values()):
                self._drop_link(link)
            self._end_generation(self._closing or "the group was closed")
            with self._wake_lock:
                self._over = True
                os.close(self._wake)
            self._run_commands()
            self._epoll.close()
            with self.link_news:
                self.link_news.notify_all()

    def _turn(self) -> None:
        try:
            events = self._epoll.poll(self._patience_s())
        except InterruptedError:
            events = []
        for fd, event in events:
            if fd == self._wake:
                os.eventfd_read(self._wake)
                continue
            link = self._by_fd.get(fd)
            if link is not None:
                self._guard(lambda link=link, event=event: self._serve(link, event))  # type: ignore[misc]
        self._run_commands()
        while self._ready:
            op = self._ready.popleft()
            self._guard(lambda op=op: self._step(op))  # type: ignore[misc]
            if op.waiting < 0:
                break
        if self._pulls:
            self._guard(self._pull_segment)
        for link in list(self._dirty):
            self._guard(lambda link=link: self._flush(link))  # type: ignore[misc]
        self._check_deadlines()

    def _patience_s(self) -> float | None:
        if self._ready or self._pulls or self._dirty or self._commands:
            return 0.0
        deadlines = [op.deadline_s for op in self._active if op.deadline_s is not None]
        if self._doubt is not None:
            deadlines.append(self._doubt[0])
        if not deadlines:
            return None
        return min(max(min(deadlines) - time.monotonic(), 0.001), 60.0)

    def _run_commands(self) -> None:
        while True:
            try:
                command = self._commands.popleft()
            except IndexError:
                return
            self._guard(command)

    def _guard(self, action: Callable[[], None]) -> None:
        """Run a piece of work; a fault in it ends the generation, not the thread."""
        try:
            action()
        except _FaultError as fault:
            self._abort(self.world.generation, fault.lost, fault.reason)
        except _DoubtError as doubt:
            # The operation stays as it is. The peer told everybody why before it let go of
            # its memory; that message names the lost, which we cannot.
            if self._doubt is None:
                self._doubt = (time.monotonic() + _DOUBT_S, str(doubt))

    def _check_deadlines(self) -> None:
        now = time.monotonic()
        if self._doubt is not None and self._doubt[0] <= now:
            self._abort(self.world.generation, frozenset(), self._doubt[1])
            return
        for op in self._active:
            if op.deadline_s is not None and op.deadline_s <= now:
                silent = sorted({k.peer for k in self._mail.posted if k.seq == op.seq})
                self._abort(
                    self.world.generation,
                    frozenset(),
                    f"{op.name} (operation {op.seq} of group {op.channel.id}) exceeded its "
                    f"timeout; nothing came from members {silent}",
                )
                return

    # -- links ------------------------------------------------------------------------------

    def _add_link(self, greeted: Greeted) -> None:
        if self._closing is not None:
            greeted.sock.close()
            return
        if greeted.peer in self._retired:
            logger.warning("refused member %s: it is no longer part of the job", greeted.peer)
            greeted.sock.close()
            return
        old = self.links.get(greeted.peer)
        if old is not None:
            self._drop_link(old)
            if greeted.peer in self.world.member_ids:
                self._abort(
                    self.world.generation,
                    frozenset(),
                    f"member {greeted.peer} replaced its connection",
                )
        link = Link(
            greeted.sock,
            greeted.peer,
            cma=greeted.cma,
            can_offer=greeted.can_offer,
            segment_bytes=self.config.segment_bytes,
        )
        self._by_fd[link.fd] = link
        link.events = select.EPOLLIN
        self._epoll.register(link.fd, link.events)
        with self.link_news:
            self.links[link.peer] = link
            self.link_news.notify_all()

    def _drop_link(self, link: Link) -> None:
        if self._by_fd.pop(link.fd, None) is None:
            return
        self._dirty.discard(link)
        self._epoll.unregister(link.fd)
        link.close()
        with self.link_news:
            if self.links.get(link.peer) is link:
                del self.links[link.peer]
            self.link_news.notify_all()

    def _lost(self, link: Link, reason: str) -> None:
        self._drop_link(link)
        if link.peer in self.world.member_ids and not link.said_bye:
            raise _FaultError(reason, frozenset({link.peer}))
        logger.debug("link to member %s ended: %s", link.peer, reason)

    def _link(self, peer: MemberId) -> Link:
        link = self.links.get(peer)
        if link is None or link.said_bye:
            raise _FaultError(f"member {peer} left before this operation", frozenset({peer}))
        return link

    def _serve(self, link: Link, event: int) -> None:
        if link.fd not in self._by_fd:
            return
        try:
            if event & select.EPOLLOUT:
                self._dirty.add(link)
            if link.parked and event & (select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR):
                # It has closed its side; what it sent before is in the kernel and no more.
                if link.parked_bytes > _LAST_WORDS_MAX or event & select.EPOLLERR:
                    raise WireError(f"member {link.peer} closed its connection in mid-message")
                link.force = True
                event |= select.EPOLLIN
            if event & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR):
                link.receive(self)
            self._arm(link)
        except ProtocolError as error:
            logger.warning("closing the link to member %s: %s", link.peer, error)
            self._lost(link, f"member {link.peer} broke the protocol: {error}")
        except (WireError, OSError) as error:
            self._lost(link, f"member {link.peer} is gone: {error}")

    def _unpark(self, link: Link) -> None:
        if link.parked:
            # Not here: we may be in the middle of reading that very link.
            self._commands.append(lambda: self._serve(link, select.EPOLLIN))

    def _flush(self, link: Link) -> None:
        self._dirty.discard(link)
        try:
            link.flush()
        except OSError as error:
            # What it said last may still be in the kernel: the reading side finds the end.
            logger.debug("cannot send to member %s: %s", link.peer, error)
            try:
                for _ in range(_LAST_READS):
                    link.receive(self)
            except (WireError, OSError):
                pass
            self._lost(link, f"member {link.peer} is gone: {error}")
            return
        self._arm(link)

    def _arm(self, link: Link) -> None:
        if link.fd not in self._by_fd:
            return
        events = select.EPOLLRDHUP if link.parked else select.EPOLLIN
        if link.has_output:
            events |= select.EPOLLOUT
        if events != link.events:
            self._epoll.modify(link.fd, events)
            link.events = events

    def _queue(self, link: Link, header: Header, view: memoryview, ticket: Ticket | None) -> None:
        link.queue(header, view, ticket, urgent=True)
        self._dirty.add(link)

    def _tell(self, member: MemberId, payload: bytes) -> None:
        link = self.links.get(member)
        if link is None or link.said_bye:
            logger.debug("no link to member %s; %s bytes dropped", member, len(payload))
            return
        header = Header(
            Kind.TELL,
            0,
            0,
            self.world.generation,
            0,
            0,
            0,
            self.member,
            0,
            len(payload),
            len(payload),
        )
        self._queue(link, header, memoryview(payload), None)

    # -- incoming frames (Router) -------------------------------------------------------------

    def place(self, link: Link, header: Header) -> tuple[memoryview, object] | None:
        if header.kind is not Kind.DATA:
            return memoryview(bytearray(header.length)), None
        if self._is_over(header.generation):
            return view_of(self._void)[: header.length], None
        key = _key_of(header)
        inbound = self._mail.find(key)
        if inbound is None:
            crowded = link.early_bytes + header.total > self.config.early_bytes_max
            if crowded and not link.awaited and not link.force and not self._anybody:
                return None
            inbound = Inbound()
            self._mail.early[key] = inbound
            link.early_bytes += header.total
            self._claim(key)
        if not inbound.started:
            self._checked(lambda: inbound.begin(key, header.total))
        assert inbound.data is not None, "a message that began has memory"
        if header.total != inbound.total:
            raise ProtocolError(f"segments of {header.total} and {inbound.total} bytes mixed")
        end = header.offset + header.length
        return view_of(inbound.data)[header.offset : end], inbound

    def arrived(self, link: Link, header: Header, view: memoryview, token: object) -> None:
        match header.kind:
            case Kind.DATA:
                if isinstance(token, Inbound):
                    self._data_arrived(link, header, token)
            case Kind.OFFER:
                self._offer_arrived(link, header, view)
            case Kind.ACK:
                ticket = self._offers.pop(_key_of(header), None)
                if ticket is not None:
                    link.awaited -= 1
                    ticket.complete()
            case Kind.ABORT:
                self._abort_arrived(header, view)
            case Kind.TELL:
                try:
                    self._on_tell(link.peer, bytes(view))
                except Exception:
                    logger.exception("the receiver of a told message raised")
            case Kind.BYE:
                link.said_bye = True
                if (
                    not self._is_over(self.world.generation)
                    and (link.awaited or link.owes)
                    and link.peer in self.world.member_ids
                ):
                    raise _FaultError(
                        f"member {link.peer} left in the middle of an operation",
                        frozenset({link.peer}),
                    )
                with self.link_news:
                    self.link_news.notify_all()

    def _data_arrived(self, link: Link, header: Header, inbound: Inbound) -> None:
        inbound.got += header.length
        if not inbound.complete:
            return
        key = _key_of(header)
        if inbound.ticket is not None and self._mail.posted.pop(key, None) is not None:
            link.awaited -= 1
            self._checked(lambda: inbound.deliver(key))

    def _offer_arrived(self, link: Link, header: Header, view: memoryview) -> None:
        if self._is_over(header.generation):
            return
        key = _key_of(header)
        inbound = self._mail.posted.get(key)
        offer = frames.parse_offer(view)
        if inbound is None:
            inbound = Inbound()
            inbound.offer = offer
            self._mail.early[key] = inbound
            self._claim(key)
            return
        inbound.offer = offer
        self._take_offer(key, inbound)

    def _take_offer(self, key: Key, inbound: Inbound) -> None:
        """An offer met its receive: hand it over, or fetch it."""
        self._mail.posted.pop(key, None)
        link = self._link(MemberId(key.peer))
        link.awaited -= 1
        ticket, offer = inbound.ticket, inbound.offer
        assert ticket is not None, "only a posted message is taken"
        assert offer is not None, "an offer has an address"
        if inbound.raw:
            ticket.data = offer
            ticket.complete()
            return
        address, length = offer
        self._checked(lambda: inbound.begin(key, length))
        assert inbound.data is not None, "a message that began has memory"
        ticket.data = inbound.data
        self._pulls.append(_Pull(key, address, inbound.data, ticket))

    def _pull_segment(self) -> None:
        pull = self._pulls.popleft()
        peer = MemberId(pull.key.peer)
        rest, step = pull.into, self.config.segment_bytes
        self.fetch(peer, pull.address, rest[:step])
        if rest.size > step:
            self._pulls.append(pull._replace(address=pull.address + step, into=rest[step:]))
            return
        self.acknowledge([pull.key])
        pull.ticket.complete()

    def _claim(self, key: Key) -> None:
        """Give an unclaimed p2p message to the first that receives from anybody."""
        if not key.flags & P2P:
            return
        for op, ticket in self._anybody:
            if _for_anybody(op, key):
                self._anybody.remove((op, ticket))
                rank = op.members.index(MemberId(key.peer))
                op.channel.took_from(rank, key.tag, key.seq)
                op.seq, op.handle.source = key.seq, rank
                ticket.complete()
                return

    def _checked(self, action: Callable[[], None]) -> None:
        try:
            action()
        except ProtocolError as error:
            # The stream is in frame; it is the ranks that disagree.
            raise _FaultError(str(error)) from error

    def _is_over(self, generation: int) -> bool:
        current = self.world.generation
        return generation < current or (
            generation == current and self._stopped is not None and self._stopped[0] == generation
        )

    def _to_self(self, key: Key, data: Bytes) -> None:
        inbound = self._mail.posted.pop(key, None)
        if inbound is None:
            inbound = Inbound()
            inbound.begin(key, data.size)
            self._mail.early[key] = inbound
            self._claim(key)
        else:
            self._checked(lambda: inbound.begin(key, data.size))
        assert inbound.data is not None, "a message that began has memory"
        copy(inbound.data, data)
        inbound.got = data.size
        if inbound.ticket is not None:
            self._checked(lambda: inbound.deliver(key))

    def _reader(self, peer: MemberId) -> CmaPeer:
        cma = self._link(peer).cma
        if cma is None:
            raise _FaultError(f"member {peer} offered memory that we cannot read")
        return cma

    def _check_held(self, peer: MemberId) -> None:
        try:
            held = self._reader(peer).holds(self.world.generation)
        except ProcessGoneError as error:
            raise _FaultError(f"member {peer} is gone: {error}", frozenset({peer})) from error
        except WireError as error:
            raise _DoubtError(f"member {peer} can no longer be read: {error}") from error
        if not held:
            raise _DoubtError(f"member {peer} withdrew its memory: its generation is over")

    # -- stepping operations ----------------------------------------------------------------

    def _start(self, op: Op) -> None:
        reason = self.stopped(op.generation)
        if reason is not None:
            self._finish(op, None, GenerationAborted(reason))
            return
        self._active.add(op)
        if op.flags & P2P:
            op.generator = op.program(op)
            self._step(op)
            return
        op.channel.queue.append(op)
        self._next_of(op.channel)

    def _next_of(self, channel: Channel) -> None:
        while channel.running is None and channel.queue:
            op = channel.queue.popleft()
            if op.ended:
                continue
            channel.running = op
            op.generator = op.program(op)
            self._step(op)

    def _step(self, op: Op) -> None:
        while not op.ended:
            assert op.generator is not None, "only a started operation is stepped"
            try:
                wait = next(op.generator)
            except StopIteration as end:
                self._finish(op, end.value, None)
                return
            except (_FaultError, _DoubtError):
                raise
            except FtkitError as error:
                raise _FaultError(f"{op.name} failed at member {self.member}: {error}") from error
            except Exception as error:
                # Ours or numpy's: the peers would wait for us, so all are told.
                logger.exception("%s (operation %s) failed", op.name, op.seq)
                self._finish(op, None, error)
                raise _FaultError(f"{op.name} failed at member {self.member}: {error!r}") from error
            if wait is None:
                self._ready.append(op)
                op.waiting = -1
                return
            tickets = (wait,) if isinstance(wait, Ticket) else tuple(wait)
            pending = [t for t in tickets if not t.done]
            if not pending:
                continue
            op.waiting = len(pending)
            for ticket in pending:
                ticket.owner = op
            return

    def _finish(self, op: Op, value: object, error: Exception | None) -> None:
        if op.ended:
            return
        op.ended = True
        self._active.discard(op)
        self.recorder.leave(op.seq, error is None)
        if error is None:
            op.handle.finish(value)
        else:
            op.handle.fail(error)
        if op.channel.running is op:
            op.channel.running = None
            if error is None:
                # Not here: a long row of short operations would nest as deep as it is long.
                self._commands.append(lambda: self._next_of(op.channel))

    # -- generations ------------------------------------------------------------------------

    def _abort_arrived(self, header: Header, view: memoryview) -> None:
        try:
            message = json.loads(bytes(view))
            lost = frozenset(MemberId(int(m)) for m in message["lost"])
            reason = str(message["reason"])[:2000]
        except (ValueError, KeyError, TypeError) as error:
            raise ProtocolError(f"an abort that says nothing: {error}") from error
        self._abort(Generation(header.generation), lost, reason)

    def _abort(self, generation: Generation, lost: frozenset[MemberId], reason: str) -> None:
        """End `generation` with a fault: flood it, and report it once."""
        with self._lock:
            if generation > self.world.generation:
                self._early_aborts.setdefault(generation, (lost, reason))
        with self.link_news:
            self.link_news.notify_all()
        if generation != self.world.generation or self.aborted_here:
            return
        self.aborted_here = True
        logger.info("generation %s ends: %s", generation, reason)
        payload = json.dumps({"lost": sorted(lost), "reason": reason}).encode()
        header = Header(
            Kind.ABORT, 0, 0, generation, 0, 0, 0, self.member, 0, len(payload), len(payload)
        )
        self._end_generation(reason, header, payload)
        try:
            self._on_fault(generation, lost, reason)
        except Exception:
            logger.exception("on_fault raised")

    aborted_here = False
    """Whether the current generation was reported as faulty."""

    def _end_generation(
        self, reason: str, flood: Header | None = None, payload: bytes = b""
    ) -> None:
        """See the module for the order. Idempotent."""
        generation = self.world.generation
        with self._lock:
            if self._stopped is None or self._stopped[0] != generation:
                self._stopped = (generation, reason)
            reason = self._stopped[1]
        self._word.withdraw()
        self._doubt = None
        self._pulls.clear()
        self._offers.clear()
        self._anybody.clear()
        self._ready.clear()
        for key, inbound in self._mail.purge(generation):
            link = self.links.get(MemberId(key.peer))
            if link is not None and inbound.offer is None:
                link.early_bytes -= inbound.total
        for link in list(self.links.values()):
            link.awaited = 0
            link.drop_output(generation)
            link.discard_input(generation)
            if flood is not None and link.peer in self.world.member_ids and not link.said_bye:
                self._queue(link, flood, memoryview(payload), None)
            self._unpark(link)
        for channel in self._channels.values():
            channel.queue.clear()
            channel.running = None
        for op in list(self._active):
            self._finish(op, None, GenerationAborted(reason))

    def _enter(self, world: World, handle: Handle[list[MemberId]]) -> None:
        if self._closing is not None:
            handle.fail(GenerationAborted(self._closing))
            return
        missing = []
        for member in world.members:
            link = self.links.get(member.member)
            if member.member != self.member and (link is None or link.said_bye):
                missing.append(member.member)
        if missing:
            handle.finish(missing)
            return
        self._end_generation(f"generation {self.world.generation} was replaced")
        gone = self.world.member_ids - world.member_ids
        self._retired |= gone
        for peer in gone:
            link = self.links.get(peer)
            if link is not None:
                self._drop_link(link)
        for key, inbound in self._mail.purge(world.generation - 1):
            link = self.links.get(MemberId(key.peer))
            if link is not None and inbound.offer is None:
                link.early_bytes -= inbound.total
        with self._lock:
            self.world = world
            self._generation = world.generation
            self._stopped = None
            self.aborted_here = False
            early = self._early_aborts.get(world.generation)
            self._early_aborts = {
                g: a for g, a in self._early_aborts.items() if g > world.generation
            }
        self._word.publish(world.generation)
        for channel in self._channels.values():
            channel.enter(world, self.member)
        for link in list(self.links.values()):
            self._unpark(link)
        handle.finish([])
        if early is not None:
            self._abort(world.generation, *early)

    # -- the end ----------------------------------------------------------------------------

    def _farewell(self) -> None:
        """BYE to all, then wait, briefly, until what is queued was taken and they closed."""
        self._end_generation("the group was closed")
        links = list(self.links.values())
        for link in links:
            header = Header(Kind.BYE, 0, 0, self.world.generation, 0, 0, 0, self.member, 0, 0, 0)
            link.queue(header, memoryview(b""), None, urgent=False)
        deadline = time.monotonic() + self.config.close_timeout_s
        poll = select.poll()
        open_links = {link.fd: link for link in links}
        shut: set[int] = set()
        for fd in open_links:
            poll.register(fd, select.POLLIN | select.POLLOUT)
        void_view = view_of(self._void)
        while open_links and (left := deadline - time.monotonic()) > 0:
            for fd, event in poll.poll(left * 1000):
                link = open_links[fd]
                try:
                    if fd not in shut:
                        link.flush()
                        if not link.has_output:
                            # Half closed: a full close with unread bytes would reset the
                            # connection and destroy what the peer has not read yet.
                            link.sock.shutdown(socket.SHUT_WR)
                            shut.add(fd)
                            poll.modify(fd, select.POLLIN)
                    if event & ~select.POLLOUT and not link.sock.recv_into(void_view):
                        raise WireError("end of stream")
                except (BlockingIOError, InterruptedError):
                    continue
                except (WireError, OSError):
                    poll.unregister(fd)
                    del open_links[fd]


def void(_: object) -> None:
    """Drop a value: a command returns nothing."""


def _for_anybody(op: Op, key: Key) -> bool:
    if not (
        key.flags & P2P
        and key.generation == op.generation
        and key.group == op.channel.id
        and key.tag == op.tag
        and MemberId(key.peer) in op.members
    ):
        return False
    return op.channel.next_from(op.members.index(MemberId(key.peer)), key.tag) == key.seq


def _key_of(header: Header) -> Key:
    return Key(
        header.generation,
        header.source,
        header.group,
        header.seq,
        header.tag,
        header.part,
        header.flags,
    )


def _header(key: Key, member: MemberId, kind: Kind, total: int) -> Header:
    return Header(
        kind,
        key.flags,
        key.group,
        key.generation,
        key.seq,
        key.tag,
        key.part,
        member,
        0,
        total,
        total,
    )
