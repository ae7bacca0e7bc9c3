"""Fetch: a snapshot in another node's arena, read through its byte server and checked here."""

import socket
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, Self

from ftkit.checkpoint.serve import RANGE_BYTES_MAX
from ftkit.checkpoint.slots import Head
from ftkit.core.errors import IntegrityError, ProtocolError, WireError
from ftkit.core.ids import Generation, NodeId, Seat, Step
from ftkit.core.inventory import Copy, Part
from ftkit.core.wire import authenticate, receive_message, send_message

HEAD_BYTES_MAX = 256 << 20


class ByteLine:
    """A connection to a byte server. Use from one thread."""

    def __init__(self, sock: socket.socket) -> None:
        """Take over `sock`, authenticated."""
        self._sock = sock
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
        self, request: Mapping[str, object], first: int, end: int, stride: int
    ) -> Iterator[memoryview]:
        """Bytes `first` to `end`, at most `stride` at a time, each valid until the next; as `ask`.

        The next range travels while this one is used.
        """
        spans = [(at, min(stride, end - at)) for at in range(first, end, stride)]
        if spans:
            self._send({**request, "at": spans[0][0], "bytes": spans[0][1]})
        for index, (_, count) in enumerate(spans):
            if (announced := self._announced(count)) != count:
                raise ProtocolError(f"asked for {count} bytes, got {announced}")
            if len(self._range) < count:
                self._range = bytearray(count)
            data = memoryview(self._range)[:count]
            self._receive(data)
            if index + 1 < len(spans):
                at, more = spans[index + 1]
                self._send({**request, "at": at, "bytes": more})
            yield data

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
        try:
            send_message(self._sock, request)
        except OSError as error:
            raise WireError(f"byte server is gone: {error}") from error

    def _announced(self, bytes_max: int) -> int:
        """How many bytes follow."""
        count = self.hear().get("bytes")
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


class Remote:
    """A connection that reads one part of a snapshot. Use from one thread."""

    def __init__(self, line: ByteLine, request: dict[str, object]) -> None:
        """Take over a connection, and read the head; see `fetch`."""
        self._line = line
        self._request = request
        self.head_bytes = bytes(line.read({**request, "op": "head"}, HEAD_BYTES_MAX))
        self.head = Head.parse(self.head_bytes)

    def blocks(
        self, chunks: range | None = None, *, range_bytes: int = RANGE_BYTES_MAX
    ) -> Iterator[memoryview]:
        """The data in order, a chunk at a time, each checked; valid until the next is asked for.

        The next range travels while this one is used.

        Args:
          chunks: which chunks, counted from the part's first (`Head.span`); None for all.
          range_bytes: of a range; two of them are held. At most 16 MiB.

        Raises:
          IntegrityError: a chunk is damaged, or the snapshot is no longer there.
          WireError: the server is gone, silent or mad.
        """
        size = self.head.sealed.chunk_bytes
        if chunks is None:
            chunks = range(len(self.head.digests))
        end = min(chunks.stop * size, self.head.sealed.data_bytes)
        stride = max(1, range_bytes // size) * size
        chunk = chunks.start
        request = {**self._request, "op": "data"}
        for data in self._line.ranges(request, chunk * size, end, stride):
            for at in range(0, len(data), size):
                block = data[at : at + size]
                self.head.check(chunk, block)
                chunk += 1
                yield block

    def close(self) -> None:
        """Hang up. May be called twice."""
        self._line.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def fetch(
    address: tuple[str, int],
    secret: bytes,
    arena: str,
    step: Step,
    generation: Generation,
    *,
    timeout_s: float = 10.0,
) -> Remote:
    """Open a part in a remote arena. Blocks until its head has been read and checked.

    Args:
      address: of an `ArenaServer`.
      secret: the job's.
      arena: the arena's file name, without directory.
      step: which snapshot.
      generation: of that step.
      timeout_s: the longest silence of the server, now and while blocks are read.

    Raises:
      IntegrityError: the snapshot is not there, or its head is damaged.
      AuthenticationError: the server holds another secret.
      ProtocolError: the server refused the request, or speaks something else.
      WireError: nobody listens, or the connection broke or fell silent.
    """
    line = ByteLine.open(address, secret, timeout_s=timeout_s)
    try:
        return Remote(line, {"arena": arena, "step": step, "generation": generation})
    except BaseException:
        line.close()
        raise


def list_copies(
    address: tuple[str, int], secret: bytes, node: NodeId, *, timeout_s: float = 10.0
) -> list[Copy]:
    """The sealed parts that a byte server has. Blocks.

    Args:
      address: of an `ArenaServer`.
      secret: the job's.
      node: the node it runs on, for the copies returned.
      timeout_s: the longest silence of the server.

    Raises:
      WireError: it cannot be reached, or answers something else.
    """
    line = ByteLine.open(address, secret, timeout_s=timeout_s)
    try:
        answer = line.ask({"op": "list"})
        return [
            Copy(
                seat=Seat(int(found["seat"])),
                node=node,
                path=str(found["arena"]),
                step=Step(int(found["step"])),
                generation=Generation(int(found["generation"])),
                part=Part.from_json(found["part"]),
            )
            for found in answer["copies"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise ProtocolError(f"byte server at {address} sent no list of copies") from error
    finally:
        line.close()
