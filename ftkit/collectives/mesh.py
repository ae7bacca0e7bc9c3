"""Mesh: finds peers and proves them, and hands over one good link per pair.

The member with the higher id dials the lower one: a newcomer, whose id is the highest,
reaches everybody while they train. Who stands by dials all, whatever its id; where two so
dial each other, the engine keeps what the higher id dialled. Both ends authenticate, compare the settings that cut
messages, and probe whether they can read each other's memory. Where they cannot, the dialler
opens the further connections that the settings ask for (`lanes`). A stranger that is silent,
speaks something else or holds another secret costs one thread until its deadline and never
delays anybody else.
"""

import contextlib
import logging
import os
import secrets
import select
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ftkit.collectives.cma import CmaPeer, ValidWord
from ftkit.collectives.config import CollectivesConfig, Transport
from ftkit.collectives.lanes import LaneDesk, LaneKey, name_of
from ftkit.core import lifeline
from ftkit.core.errors import AuthenticationError, WireError
from ftkit.core.ids import MemberId
from ftkit.core.wire import authenticate, listen, receive_message, send_message

logger = logging.getLogger(__name__)

_GREETINGS_MAX = 64
#: What one of several connections may hold that it cannot send yet.
_LANE_UNSENT_BYTES = 128 << 10
#: A host that vanished without a word says nothing for ever; one that is there answers the
#: kernel's question whatever its processes do. Seconds of silence, and between questions; questions.
_SILENCE_S, _ASK_AGAIN_S, _QUESTIONS = 10, 5, 4
_ALL_INTERFACES = ("", "0.0.0.0", "::")


@dataclass(frozen=True, slots=True)
class Greeted:
    """Connections that passed the greeting. Owned by whoever receives them."""

    sock: socket.socket
    peer: MemberId
    process: str
    """Names the process at the other end: two of them may claim to be one member."""
    cma: CmaPeer | None
    can_offer: bool
    dialled: bool
    """Whether it was us who opened it."""
    lifeline: object = None
    """What the process says of its lifeline."""
    lanes: tuple[socket.socket, ...] = ()
    """Further connections to the same peer, as good as the first."""

    def close(self) -> None:
        """Nobody wants them."""
        for sock in (self.sock, *self.lanes):
            sock.close()


class Mesh:
    """The listener of one member. Thread-safe; `close` ends every thread it started."""

    def __init__(
        self,
        member: MemberId,
        secret: bytes,
        host: str,
        config: CollectivesConfig,
        word: ValidWord,
        on_link: Callable[[Greeted], None],
    ) -> None:
        """Listen on a free port of `host`.

        Args:
          member: who we are.
          secret: the job's secret.
          host: address to bind; peers dial it.
          config: must agree with the peers' in `wire`.
          word: our published words, for the peers' probes.
          on_link: receives each accepted link, on a greeting thread.
        """
        self.member = member
        self._secret = secret
        self._config = config
        self._word = word
        self._process = secrets.token_hex(8)
        self._on_link = on_link
        self._listener = listen(host)
        name = self._listener.getsockname()
        self.address: tuple[str, int] = (
            socket.gethostname() if host in _ALL_INTERFACES else host,
            int(name[1]),
        )
        self._listener.setblocking(False)
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._lock = threading.Lock()
        self._desk = LaneDesk(config.greeting_timeout_s)
        self._greetings: dict[socket.socket, tuple[float, threading.Thread]] = {}
        self._closed = False
        self._thread = threading.Thread(target=self._accept, name="ftkit-accept", daemon=True)
        self._thread.start()

    def dial(
        self,
        peer: MemberId,
        address: tuple[str, int],
        *,
        timeout_s: float,
        connect: Callable[[float], socket.socket] | None = None,
    ) -> Greeted:
        """Connect to `peer`, blocking for at most about `timeout_s`.

        `connect` opens the connection within so many seconds, where it is not to be the
        shortest way.

        Raises:
          WireError: nobody answers there, the greeting failed, or somebody else lives there.
        """
        opened = connect or partial(self._straight, address)
        name = secrets.token_hex(8)
        greeted = self._dial(peer, address, opened, name, timeout_s, further=False)
        lanes: list[socket.socket] = []
        with contextlib.ExitStack() as undo:
            undo.callback(greeted.sock.close)
            for _ in range(self._further(greeted)):
                lane = self._dial(peer, address, opened, name, timeout_s, further=True).sock
                undo.callback(lane.close)
                lanes.append(lane)
            undo.pop_all()
        return replace(greeted, lanes=tuple(lanes))

    def _straight(self, address: tuple[str, int], timeout_s: float) -> socket.socket:
        """A connection to `address`. OSError when there is none to be had."""
        sock = socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET)
        try:
            _tune(sock, lanes=self._config.connections)  # what it announces depends on its buffers
            sock.settimeout(timeout_s)
            sock.connect(address)
        except OSError:
            sock.close()
            raise
        return sock

    def _dial(
        self,
        peer: MemberId,
        address: tuple[str, int],
        connect: Callable[[float], socket.socket],
        name: str,
        timeout_s: float,
        *,
        further: bool,
    ) -> Greeted:
        try:
            sock = connect(timeout_s)
        except OSError as error:
            raise WireError(f"cannot reach member {peer} at {address}: {error}") from error
        try:
            _tune(sock, lanes=self._config.connections)
            greeted, _ = self._greet(
                sock,
                server=False,
                timeout_s=min(timeout_s, self._config.greeting_timeout_s),
                name=name,
                further=further,
            )
        except OSError as error:
            sock.close()
            raise WireError(f"cannot reach member {peer} at {address}: {error}") from error
        except WireError:
            sock.close()
            raise
        if greeted.peer != peer:
            sock.close()
            raise WireError(f"at {address} lives member {greeted.peer}, not {peer}")
        return greeted

    def _further(self, greeted: Greeted) -> int:
        """How many more connections the pair opens; both sides come to the same."""
        by_memory = greeted.cma is not None and greeted.can_offer
        return 0 if by_memory else self._config.connections - 1

    def close(self) -> None:
        """Stop listening, cut greetings short, join all threads. Twice is fine."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        self._desk.close()
        with self._lock:
            greetings = dict(self._greetings)
        for sock, (_, thread) in greetings.items():
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            thread.join()
        self._listener.close()
        os.close(self._wake)

    def let_go(self) -> None:
        """(in a forked child) Close all descriptors; the parent goes on with its own."""
        if self._closed:
            return
        self._closed = True
        self._lock = threading.Lock()
        self._desk = LaneDesk(self._config.greeting_timeout_s)
        for sock in (self._listener, *self._greetings):
            sock.close()
        os.close(self._wake)

    def _accept(self) -> None:
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        while not self._closed:
            poll.poll(1000 if self._greetings else None)
            self._cut_overdue()
            try:
                sock, address = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                continue
            except OSError as error:
                # Out of descriptors, most likely: the backlog keeps the peers waiting.
                logger.warning("cannot accept a connection: %s", error)
                if select.select([self._wake], [], [], 0.2)[0]:
                    return
                continue
            with self._lock:
                pending = len(self._greetings)
                if pending >= _GREETINGS_MAX * self._config.connections:
                    logger.warning("%s refused: %s greetings are pending", address, pending)
                    sock.close()
                    continue
                thread = threading.Thread(
                    target=self._receive, args=(sock, address), name="ftkit-greet", daemon=True
                )
                deadline = time.monotonic() + 2 * self._config.greeting_timeout_s
                self._greetings[sock] = (deadline, thread)
            thread.start()

    def _cut_overdue(self) -> None:
        # The greeting's own timeout is for each read; who sends a byte now and then would
        # outlast it.
        now = time.monotonic()
        with self._lock:
            overdue = [s for s, (deadline, _) in self._greetings.items() if deadline < now]
        for sock in overdue:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _receive(self, sock: socket.socket, address: object) -> None:
        try:
            sock.setblocking(True)
            _tune(sock, lanes=self._config.connections)
            timeout_s = self._config.greeting_timeout_s
            greeted, key = self._greet(sock, server=True, timeout_s=timeout_s)
            if key is not None:
                self._desk.bring(key, sock)
                return
        except AuthenticationError as error:
            logger.warning("refused a connection from %s: %s", address, error)
            sock.close()
        except (WireError, OSError) as error:
            logger.info("dropped a connection from %s: %s", address, error)
            sock.close()
        else:
            self._on_link(greeted)
        finally:
            with self._lock:
                self._greetings.pop(sock, None)

    def _greet(
        self,
        sock: socket.socket,
        *,
        server: bool,
        timeout_s: float,
        name: str = "",
        further: bool = False,
    ) -> tuple[Greeted, LaneKey | None]:
        """The peer; and, on the accepting side, the link that this is a further lane of.

        An accepted link comes with all its lanes.
        """
        told = lifeline.own()
        hello = {
            "lifeline": told and told._asdict(),
            "member": self.member,
            "process": self._process,
            "config": self._config.wire,
            "memory": self._word.hello(),
            "link": name,
            "lane": further,
        }
        theirs = authenticate(sock, self._secret, server=server, hello=hello, timeout_s=timeout_s)
        peer = _member_of(theirs)
        if peer == self.member:
            raise WireError(f"a peer claims to be us, member {peer}")
        if theirs.get("config") != self._config.wire:
            raise WireError(
                f"member {peer} is configured with {theirs.get('config')}, we with "
                f"{self._config.wire}; give every member the same CollectivesConfig"
            )
        cma = None
        if self._config.transport is not Transport.TCP:
            cma = CmaPeer.probe(theirs.get("memory"))
        # The answer to a question asked of a stranger's memory is told to both: each pair
        # and direction agrees on its transport before the first byte.
        sock.settimeout(timeout_s)
        try:
            send_message(sock, {"reads_you": cma is not None})
            can_offer = receive_message(sock, bytes_max=256).get("reads_you") is True
        finally:
            sock.settimeout(None)
        if self._config.transport is Transport.CMA and not (cma and can_offer):
            raise WireError(
                f"transport 'cma' was demanded, but members {self.member} and {peer} cannot "
                "read each other's memory (another host, or ptrace is not permitted)"
            )
        process, told_us = str(theirs.get("process")), theirs.get("lifeline")
        greeted = Greeted(sock, peer, process, cma, can_offer, dialled=not server, lifeline=told_us)
        if not server:
            return greeted, None
        name, further = name_of(theirs)
        key = LaneKey(peer, name)
        if further:
            return greeted, key
        if count := self._further(greeted):
            greeted = replace(greeted, lanes=self._desk.collect(key, count))
        return greeted, None


def _member_of(hello: Mapping[str, Any]) -> MemberId:
    member = hello.get("member")
    if not isinstance(member, int) or isinstance(member, bool) or not 0 <= member < 1 << 32:
        raise WireError(f"a member's number is expected in a hello, not {member!r}")
    return MemberId(member)


def _tune(sock: socket.socket, *, lanes: int) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # Not TCP_USER_TIMEOUT: it would also cut a peer that is alive and does not read for a while.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _SILENCE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _ASK_AGAIN_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _QUESTIONS)
    if lanes > 1:
        # A slow lane must not take more than it can send soon, while others stand idle.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _LANE_UNSENT_BYTES)
    # bbr paces, which on loopback and in a rack costs half of the bandwidth. A kernel
    # without cubic keeps its own choice. Buffers are left to the kernel's tuning, which may
    # go beyond what an ordinary user may set.
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"cubic")
