"""LinkSet: all links of this process with their lanes, their readiness, and their ends.

Owned by the communication thread. Other threads may look up `links`, and wait for `news`.
"""

import contextlib
import logging
import math
import select
import socket
import threading
import time
from collections.abc import Callable
from functools import partial

import numpy as np

from ftkit.collectives.arithmetic import view_of
from ftkit.collectives.faults import FaultError
from ftkit.collectives.frames import Header
from ftkit.collectives.fuse import Fuse
from ftkit.collectives.link import Link, Router, Ticket
from ftkit.collectives.mesh import Greeted
from ftkit.core.errors import ProtocolError, WireError
from ftkit.core.ids import MemberId
from ftkit.core.lifeline_watch import LifelineWatch

logger = logging.getLogger(__name__)

#: A message that a peer left unfinished in the kernel cannot be longer than its buffers.
_LAST_WORDS_MAX = 64 << 20
_LAST_READS = 64


class LinkSet:
    """See the module."""

    def __init__(
        self,
        segment_bytes: int,
        later: Callable[[Callable[[], None]], None],
        on_lost: Callable[[Link, str], None],
    ) -> None:
        """Start without links.

        Args:
          segment_bytes: payload of a frame.
          later: runs a command in this turn of the loop or the next; from any thread.
          on_lost: told, after the fact, of a link that ended; may raise FaultError.
        """
        self.links: dict[MemberId, Link] = {}
        self.news = threading.Condition()
        """Notified whenever the set of links, or a reason to stop waiting, changes."""
        self.router: Router | None = None
        """Where incoming frames go; set once by the engine, before the first link."""
        self.dirty: set[Link] = set()
        self.fuse = Fuse()
        self._segment = segment_bytes
        self._later = later
        self._on_lost = on_lost
        self._by_fd: dict[int, Link] = {}
        self._epoll = select.epoll()
        self._lifelines = LifelineWatch()
        self._tickets: dict[Link, int | None] = {}

    def watch(self, fd: int) -> None:
        """Report `fd`, too, from `poll`, each time that it is written to."""
        self._epoll.register(fd, select.EPOLLIN | select.EPOLLET)

    def poll(self, patience_s: float) -> list[tuple[int, int]]:
        """(descriptor, events) of what is ready; waits for at most `patience_s`."""
        try:
            return self._epoll.poll(-1 if patience_s == math.inf else patience_s)
        except InterruptedError:
            return []

    def by_fd(self, fd: int) -> Link | None:
        return self._by_fd.get(fd)

    def living(self, peer: MemberId) -> Link:
        """The link to `peer`. FaultError when it is gone, or has said goodbye."""
        link = self.links.get(peer)
        if link is None or link.said_bye:
            raise FaultError(f"member {peer} left before this operation", frozenset({peer}))
        return link

    def missing(self, members: frozenset[MemberId]) -> list[MemberId]:
        """Those of `members` to whom no living link exists."""
        return sorted(m for m in members if (link := self.links.get(m)) is None or link.said_bye)

    def tell_news(self) -> None:
        with self.news:
            self.news.notify_all()

    def add(self, greeted: Greeted) -> None:
        """Take over a link's connections; there are none to this peer."""
        root: Link | None = None
        for sock in (greeted.sock, *greeted.lanes):
            lane = Link(
                sock,
                greeted.peer,
                process=greeted.process,
                dialled=greeted.dialled,
                cma=greeted.cma,
                can_offer=greeted.can_offer,
                segment_bytes=self._segment,
                fuse=self.fuse,
                root=root,
            )
            root = root or lane
            self._by_fd[lane.fd] = lane
            lane.events = select.EPOLLIN
            self._epoll.register(lane.fd, lane.events)
        link = lane.root
        with self.news:
            self.links[link.peer] = link
            self.news.notify_all()
        self._tickets[link] = self._lifelines.watch(
            greeted.lifeline, lambda code: self._later(partial(self._process_exits, link, code))
        )

    def drop(self, link: Link) -> None:
        """Close a link, all lanes, without a word."""
        self._lifelines.forget(self._tickets.pop(link, None))
        open_lanes = [self._retire(lane) for lane in link.lanes]
        if not any(open_lanes):
            return
        with self.news:
            if self.links.get(link.peer) is link:
                del self.links[link.peer]
            self.news.notify_all()

    def _retire(self, lane: Link) -> bool:
        """Close one connection; False when it was closed before."""
        if self._by_fd.pop(lane.fd, None) is None:
            return False
        self.dirty.discard(lane)
        self._epoll.unregister(lane.fd)
        lane.close()
        return True

    def dismiss(self, link: Link, goodbye: Header) -> None:
        """Drop a link with a goodbye, if it still takes one: its peer is no longer with us."""
        link.say_goodbye(goodbye)
        for lane in link.lanes:
            with contextlib.suppress(OSError):
                lane.flush()
        self.drop(link)

    def serve(self, link: Link, event: int) -> None:
        """React to what epoll said of `link`. FaultError when that ends the generation."""
        if link.fd not in self._by_fd:
            return
        try:
            if event & select.EPOLLOUT:
                self.dirty.add(link)
            if link.parked and event & (select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR):
                # It has closed its side; what it sent before is in the kernel and no more.
                if link.parked_bytes > _LAST_WORDS_MAX or event & select.EPOLLERR:
                    raise WireError(f"member {link.peer} closed its connection in mid-message")
                link.root.force = True
                event |= select.EPOLLIN
            if event & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR):
                link.receive(self._routes())
            self._arm(link)
        except ProtocolError as error:
            logger.warning("closing the link to member %s: %s", link.peer, error)
            self._lost(link, f"member {link.peer} broke the protocol: {error}")
        except (WireError, OSError) as error:
            self._lost(link, f"member {link.peer} is gone: {error}")

    def _lost(self, lane: Link, reason: str) -> None:
        root = lane.root
        if lane.ended and not root.said_bye:
            # It ended in good order, and others still carry something.
            self._retire(lane)
            return
        self.drop(root)
        self._on_lost(root, reason)

    def _routes(self) -> Router:
        assert self.router is not None, "the engine sets the router before the first link"
        return self.router

    def unpark(self, link: Link) -> None:
        """Go on reading the lanes of a link that were parked."""
        for lane in link.lanes:
            if lane.parked:
                # Not here: we may be in the middle of reading that very lane.
                self._later(partial(self.serve, lane, select.EPOLLIN))

    def flush(self, link: Link) -> None:
        """Send what the kernel takes. FaultError when the peer is gone and was needed."""
        self.dirty.discard(link)
        try:
            link.flush()
        except OSError as error:
            # What it said last may still be in the kernel: the reading side finds the end.
            logger.debug("cannot send to member %s: %s", link.peer, error)
            self._hear_out(link.root)
            self._lost(link, f"member {link.peer} is gone: {error}")
            return
        self._arm(link)

    def _hear_out(self, link: Link) -> None:
        for lane in list(link.lanes):
            with contextlib.suppress(WireError, OSError):
                for _ in range(_LAST_READS):
                    lane.receive(self._routes())

    def _process_exits(self, link: Link, code: int | None) -> None:
        """The peer's process will send nothing more; its connections end when its memory is free.

        Raises FaultError when it was needed.
        """
        if self.links.get(link.peer) is not link:
            return
        self._hear_out(link)
        self.drop(link)
        how = "" if code is None else f" with code {code}" if code >= 0 else f" by signal {-code}"
        self._on_lost(link, f"member {link.peer} is gone: its process exits{how}")

    def _arm(self, link: Link) -> None:
        if link.fd not in self._by_fd:
            return
        events = select.EPOLLRDHUP if link.parked else select.EPOLLIN
        if link.has_output:
            events |= select.EPOLLOUT
        if events != link.events:
            self._epoll.modify(link.fd, events)
            link.events = events

    def queue(
        self,
        link: Link,
        header: Header,
        payload: memoryview,
        ticket: Ticket | None = None,
        *,
        urgent: bool = True,
    ) -> None:
        """Append a message to what `link` has to send in this turn."""
        link.queue(header, payload, ticket, urgent=urgent)
        self.dirty.add(link)
        if not urgent and len(link.lanes) > 1:
            self.dirty.update(lane for lane in link.lanes if lane.fd in self._by_fd)

    def let_go(self) -> None:
        """(in a forked child) Close all descriptors; the parent goes on with its own."""
        self._lifelines = LifelineWatch()
        for lane in self._by_fd.values():
            lane.close()
        self._by_fd.clear()
        self.links.clear()
        self._epoll.close()

    def close(self) -> None:
        """Drop every link."""
        for lane in list(self._by_fd.values()):
            self.drop(lane.root)
        self._epoll.close()
        self._lifelines.close()

    def farewell(self, header: Header, timeout_s: float) -> None:
        """BYE to all, then wait, briefly, until what is queued was taken and they closed."""
        links = list(self.links.values())
        for link in links:
            link.say_goodbye(header)
        deadline = time.monotonic() + timeout_s
        poll = select.poll()
        open_links = {
            lane.fd: lane for link in links for lane in link.lanes if lane.fd in self._by_fd
        }
        shut: set[int] = set()
        for fd, link in open_links.items():
            link.wake_for(1)  # whatever comes is read, and thrown away
            poll.register(fd, select.POLLIN | select.POLLOUT)
        void_view = view_of(np.empty(self._segment, dtype=np.uint8))
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
