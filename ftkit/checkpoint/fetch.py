"""Fetch: a snapshot in another node's arena, read through its byte server and checked here."""

import socket
from collections.abc import Iterator
from types import TracebackType
from typing import Self

from ftkit.checkpoint.serve import RANGE_BYTES_MAX
from ftkit.checkpoint.slots import Head
from ftkit.core.errors import IntegrityError, ProtocolError, WireError
from ftkit.core.ids import Generation, NodeId, Seat, Step
from ftkit.core.inventory import Copy, Part
from ftkit.core.wire import authenticate, connect, receive_message, send_message

HEAD_BYTES_MAX = 256 << 20


class Remote:
    """A connection that reads one part of a snapshot. Use from one thread."""

    def __init__(self, sock: socket.socket, request: dict[str, object]) -> None:
        """Take over `sock`, authenticated, and read the head; see `fetch`."""
        self._sock = sock
        self._request = request
        self.head = Head.parse(bytes(self._ask({"op": "head"}, HEAD_BYTES_MAX)))

    def blocks(self, chunks: range | None = None) -> Iterator[memoryview]:
        """The data in order, a chunk at a time, each checked; valid until the next is asked for.

        The next range travels while this one is used: at most 32 MiB are held.

        Args:
          chunks: which chunks, counted from the part's first (`Head.span`); None for all.

        Raises:
          IntegrityError: a chunk is damaged, or the snapshot is no longer there.
          WireError: the server is gone, silent or mad.
        """
        size = self.head.sealed.chunk_bytes
        if chunks is None:
            chunks = range(len(self.head.digests))
        end = min(chunks.stop * size, self.head.sealed.data_bytes)
        stride = RANGE_BYTES_MAX // size * size
        spans = [(at, min(stride, end - at)) for at in range(chunks.start * size, end, stride)]
        if spans:
            self._request_range(*spans[0])
        chunk = chunks.start
        for index, (_, count) in enumerate(spans):
            data = memoryview(self._reply(count))
            if len(data) != count:
                raise ProtocolError(f"asked for {count} bytes, got {len(data)}")
            if index + 1 < len(spans):
                self._request_range(*spans[index + 1])
            for at in range(0, count, size):
                block = data[at : at + size]
                self.head.check(chunk, block)
                chunk += 1
                yield block

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

    def _ask(self, request: dict[str, object], bytes_max: int) -> bytearray:
        send_message(self._sock, self._request | request)
        return self._reply(bytes_max)

    def _request_range(self, at: int, count: int) -> None:
        try:
            send_message(self._sock, self._request | {"op": "data", "at": at, "bytes": count})
        except OSError as error:
            raise WireError(f"byte server is gone: {error}") from error

    def _reply(self, bytes_max: int) -> bytearray:
        try:
            reply = receive_message(self._sock)
            if "error" in reply:
                kind = IntegrityError if reply.get("lost") is True else ProtocolError
                raise kind(f"byte server: {reply['error']!s:.500}")
            count = reply.get("bytes")
            if type(count) is not int or not 0 <= count <= bytes_max:
                raise ProtocolError(
                    f"byte server announces {count!r:.20} bytes, at most {bytes_max} are allowed"
                )
            data = bytearray(count)
            view = memoryview(data)
            while view:
                got = self._sock.recv_into(view)
                if not got:
                    raise WireError(f"byte server hung up, {len(view)} of {count} bytes missing")
                view = view[got:]
        except OSError as error:
            raise WireError(f"byte server is gone or silent: {error}") from error
        return data


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
    try:
        sock = socket.create_connection(address, timeout=timeout_s)
    except OSError as error:
        raise WireError(f"cannot reach the byte server at {address}: {error}") from error
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        authenticate(sock, secret, server=False, timeout_s=timeout_s)
        sock.settimeout(timeout_s)
        return Remote(sock, {"arena": arena, "step": step, "generation": generation})
    except OSError as error:
        sock.close()
        raise WireError(f"byte server at {address} is gone: {error}") from error
    except BaseException:
        sock.close()
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
    line = connect(address, secret, hello={}, timeout_s=timeout_s)
    try:
        line.send({"op": "list"})
        answer = line.receive()
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
