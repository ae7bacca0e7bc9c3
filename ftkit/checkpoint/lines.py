"""Lines: connections to byte servers, authenticated once and kept for whoever asks next.

A connection is kept when the last answer on it is complete, and closed in any other case: what
is left over from a stream that broke off would be taken for an answer to the next request. One
that is dead or strange by the time it is wanted again is replaced, so that whoever borrows one
never sees that it is not new.
"""

import select
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from ftkit.core.errors import IntegrityError, ProtocolError, WireError
from ftkit.core.wire import authenticate, receive_message, send_message

Address = tuple[str, int]

#: A connection that was idle for longer is not used again: the server drops it after a minute,
#: and might while a request is on its way.
KEEP_S = 30.0

#: Idle connections kept to one server. A round takes two: one to lead, one to read.
KEEP_MAX = 4


class Lines:
    """Connections to the byte servers of one job. Any thread may call."""

    def __init__(
        self,
        secret: bytes,
        *,
        timeout_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Hold none yet.

        Args:
          secret: the job's.
          timeout_s: the longest silence of a server.
          clock: seconds.
        """
        self._secret, self._timeout_s, self._clock = secret, timeout_s, clock
        self._lock = threading.Lock()
        # ---- under the lock ----
        self._idle: dict[Address, list[tuple[float, ByteLine]]] = {}
        self._wanted: frozenset[Address] | None = None

    @contextmanager
    def borrow(self, address: Address) -> "Iterator[ByteLine]":
        """A connection that nobody else uses meanwhile. Blocks while a new one is made.

        Raises:
          AuthenticationError: the server holds another secret.
          WireError: nobody listens, or does not answer.
        """
        line = self._take(address)
        if line is None:
            line = ByteLine.open(address, self._secret, timeout_s=self._timeout_s)
        try:
            yield line
        finally:
            self._give_back(address, line)

    def only(self, addresses: Collection[Address]) -> None:
        """Close what is idle, and what comes back later, to all other servers: they left."""
        with self._lock:
            self._wanted = frozenset(addresses)
            left = [self._idle.pop(a) for a in self._idle.keys() - self._wanted]
        for lines in left:
            for _, line in lines:
                line.close()

    def close(self) -> None:
        """Close all that is idle, and the rest as it comes back. May be called twice."""
        self.only(())

    def _take(self, address: Address) -> "ByteLine | None":
        """The connection that was used last, if it is still good."""
        while True:
            with self._lock:
                idle = self._idle.get(address)
                if not idle:
                    return None
                since, line = idle.pop()
            if self._clock() - since <= KEEP_S and line.is_idle:
                return line
            line.close()

    def _give_back(self, address: Address, line: "ByteLine") -> None:
        if line.is_idle:
            with self._lock:
                if self._wanted is None or address in self._wanted:
                    idle = self._idle.setdefault(address, [])
                    if len(idle) < KEEP_MAX:
                        idle.append((self._clock(), line))
                        return
        line.close()


class ByteLine:
    """A connection to a byte server. Use from one thread."""

    def __init__(self, sock: socket.socket) -> None:
        """Take over `sock`, authenticated."""
        self._sock = sock
        self._owed = 0
        """Messages, and runs of bytes that one announced, which have not come yet."""
        # Used again for each range: fresh pages would cost more than what travels into them.
        self._range = bytearray()

    @classmethod
    def open(cls, address: tuple[str, int], secret: bytes, *, timeout_s: float) -> Self:
        """Connect. Blocks; see `fetch` for the arguments and what is raised."""
        try:
            sock = socket.create_connection(address, timeout=timeout_s)
        except OSError as error:
            raise WireError(f"cannot reach the byte server at {address}: {error}") from error
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            authenticate(sock, secret, server=False, timeout_s=timeout_s)
            sock.settimeout(timeout_s)
        except OSError as error:
            sock.close()
            raise WireError(f"byte server at {address} is gone: {error}") from error
        except BaseException:
            sock.close()
            raise
        return cls(sock)

    def ask(self, request: Mapping[str, object]) -> dict[str, Any]:
        """Send a request and return the message that answers it.

        Raises:
          IntegrityError: what was asked for is not there.
          ProtocolError: the server refused it.
          WireError: the server is gone, silent or mad.
        """
        self._send(request)
        return self.hear()

    def hear(self) -> dict[str, Any]:
        """One more message of an answer; as `ask`."""
        try:
            reply = receive_message(self._sock)
        except OSError as error:
            raise WireError(f"byte server is gone or silent: {error}") from error
        self._owed -= not reply.get("working")
        if "error" in reply:
            kind = IntegrityError if reply.get("lost") is True else ProtocolError
            raise kind(f"byte server: {reply['error']!s:.500}")
        return reply

    def read(self, request: Mapping[str, object], bytes_max: int) -> bytearray:
        """Send a request and return the bytes that answer it; as `ask`."""
        self._send(request)
        data = bytearray(self._announced(bytes_max))
        self._receive(memoryview(data))
        return data

    def ranges(
        self,
        request: Mapping[str, object],
        first: int,
        end: int,
        stride: int,
    ) -> Iterator[memoryview]:
        """Bytes `first` to `end`, at most `stride` at a time, each valid until the next; as `ask`.

        The next range travels while this one is used.
        """
        spans = [(at, min(stride, end - at)) for at in range(first, end, stride)]
        if spans:
            self.ask_for(request, *spans[0])
        for index, (_, count) in enumerate(spans):
            if len(self._range) < count:
                self._range = bytearray(count)
            data = memoryview(self._range)[:count]
            self.take_in(data)
            if index + 1 < len(spans):
                self.ask_for(request, *spans[index + 1])
            yield data

    def ask_for(self, request: Mapping[str, object], at: int, count: int) -> None:
        """Ask for a range, which `take_in` receives; several, in their order. WireError."""
        self._send({**request, "at": at, "bytes": count})

    def take_in(self, into: memoryview) -> None:
        """The range that was asked for first, of this size. Blocks; as `ask`."""
        if (announced := self._announced(len(into))) != len(into):
            raise ProtocolError(f"asked for {len(into)} bytes, got {announced}")
        self._receive(into)

    @property
    def is_idle(self) -> bool:
        """Whether it can be asked: nothing of an answer is missing, and the server is there."""
        if self._owed or self._sock.fileno() < 0:
            return False
        # Whatever is there to be read now was not asked for: the end of the stream, mostly.
        # Not select(), which knows descriptors below 1024 only.
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        return not poll.poll(0)

    def close(self) -> None:
        """Hang up. May be called twice."""
        self._sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _send(self, request: Mapping[str, object]) -> None:
        self._owed += 1
        try:
            send_message(self._sock, request)
        except OSError as error:
            raise WireError(f"byte server is gone: {error}") from error

    def _announced(self, bytes_max: int) -> int:
        """How many bytes follow."""
        count = self.hear().get("bytes")
        self._owed += 1
        if type(count) is not int or not 0 <= count <= bytes_max:
            raise ProtocolError(
                f"byte server announces {count!r:.20} bytes, at most {bytes_max} are allowed"
            )
        return count

    def _receive(self, view: memoryview) -> None:
        count = len(view)
        try:
            while view:
                got = self._sock.recv_into(view)
                if not got:
                    raise WireError(f"byte server hung up, {len(view)} of {count} bytes missing")
                view = view[got:]
        except OSError as error:
            raise WireError(f"byte server is gone or silent: {error}") from error
        self._owed -= 1
