"""The byte server: sealed snapshots of one job's arenas, read-only, to whoever joins.

An agent runs it. After the mutual challenge of `core.wire` the client sends requests, one
after another, and each is answered by one message and, on success, that many raw bytes::

    {"op": "head", "arena": name, "step": 7, "generation": 2}                 -> {"bytes": n} n bytes
    {"op": "data", ... the same ..., "at": 0, "bytes": 16777216}              -> {"bytes": n} n bytes
    {"op": "list"}                                                            -> {"copies": [...]}

    anything wrong                        -> {"error": "...", "lost": true when it is not there}

The server promises nothing about the bytes: the reader checks every digest. A name is a bare
file name of this job's arenas and nothing else; links are not followed.
"""

import contextlib
import logging
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ftkit.checkpoint.arena import Arena, arena_path
from ftkit.checkpoint.slots import Head, Sealed
from ftkit.core.errors import IntegrityError, ProtocolError, WireError
from ftkit.core.ids import Generation, JobId, NodeId, Seat, Step
from ftkit.core.inventory import Copy
from ftkit.core.wire import authenticate, connect, listen, receive_message, send_message

logger = logging.getLogger(__name__)

RANGE_BYTES_MAX = 16 << 20
HEAD_BYTES_MAX = 256 << 20
CONNECTIONS_MAX = 64
_REQUEST_BYTES_MAX = 4096


class ArenaServer:
    """Serves the arenas of one job in one directory. Owns its threads; `close` ends them."""

    def __init__(
        self,
        directory: Path,
        job: JobId,
        secret: bytes,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        idle_s: float = 60.0,
    ) -> None:
        """Listen, and serve from threads of its own.

        Args:
          directory: where the arenas lie; nothing outside it is ever opened.
          job: only arenas named for this job are served.
          secret: the job's.
          host: the address to bind to.
          port: the port; 0 for any.
          idle_s: the longest silence of a client before it is dropped.

        Raises:
          OSError: the address cannot be bound.
        """
        self._directory = directory
        stem = arena_path(job, Seat(0), directory).name.removesuffix("0.arena")
        self._name = re.compile(re.escape(stem) + r"(\d+)\.arena")
        self._secret = secret
        self._idle_s = idle_s
        self._lock = threading.Lock()
        self._clients: dict[socket.socket, threading.Thread] = {}
        self._closed = threading.Event()
        self._socket = listen(host, port)
        name: Any = self._socket.getsockname()
        self.address: tuple[str, int] = (str(name[0]), int(name[1]))
        """(host, port) to connect to."""
        self._thread = threading.Thread(target=self._accept, name="ftkit-serve", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Drop all clients and end all threads. May be called twice."""
        with self._lock:
            self._closed.set()
            clients = dict(self._clients)
        # A blocked accept does not notice close(), but it does notice shutdown().
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join()
        for sock, thread in clients.items():
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._socket.accept()
            except OSError:
                # Out of descriptors, or the client hung up while queueing: neither is our end,
                # but the first would be met again at once.
                if self._closed.wait(0.1):
                    return
                logger.warning("byte server could not accept a connection", exc_info=True)
                continue
            thread = threading.Thread(
                target=self._serve, args=(sock,), name="ftkit-serve-client", daemon=True
            )
            with self._lock:
                if self._closed.is_set() or len(self._clients) >= CONNECTIONS_MAX:
                    sock.close()
                    continue
                self._clients[sock] = thread
                thread.start()

    def _serve(self, sock: socket.socket) -> None:
        try:
            authenticate(sock, self._secret, server=True)
            sock.settimeout(self._idle_s)
            while True:
                self._answer(sock, receive_message(sock, bytes_max=_REQUEST_BYTES_MAX))
        except (OSError, WireError) as error:
            # A client that is done hangs up, and that arrives here too.
            logger.debug("byte server's client left: %s", error)
        finally:
            with self._lock:
                self._clients.pop(sock, None)
            sock.close()

    def _answer(self, sock: socket.socket, request: dict[str, Any]) -> None:
        try:
            if request.get("op") == "list":
                send_message(sock, {"copies": self._list()})
                return
            self._send(sock, request)
        except IntegrityError as error:
            send_message(sock, {"error": str(error), "lost": True})
        except ProtocolError as error:
            send_message(sock, {"error": str(error), "lost": False})

    def _list(self) -> list[dict[str, object]]:
        found = list[dict[str, object]]()
        for path in sorted(self._directory.iterdir()):
            match = self._name.fullmatch(path.name)
            if match is None:
                continue
            try:
                with Arena.open(path) as arena:
                    snapshots = arena.snapshots()
            except (OSError, IntegrityError):
                # It was replaced or removed this instant, or is damaged: it has nothing to give.
                continue
            found += (
                {
                    "arena": path.name,
                    "seat": int(match[1]),
                    "step": s.step,
                    "generation": s.generation,
                }
                for s in snapshots
            )
        return found

    def _send(self, sock: socket.socket, request: dict[str, Any]) -> None:
        name = request.get("arena")
        if not isinstance(name, str) or self._name.fullmatch(name) is None:
            raise ProtocolError(f"{name!r:.80} is not the name of an arena of this job")
        step, generation = (_natural(request, key) for key in ("step", "generation"))
        try:
            arena = Arena.open(self._directory / name)
        except OSError as error:
            raise IntegrityError(f"{name} cannot be opened: {error.strerror}") from error
        with arena:
            sealed = arena.find(Step(step), Generation(generation))
            if request.get("op") == "head":
                _send_bytes(sock, memoryview(arena.head_bytes(sealed)))
            elif request.get("op") == "data":
                _send_bytes(sock, _range(arena, sealed, request))
            else:
                raise ProtocolError(f"{request.get('op')!r:.80} is not an operation")


class Remote:
    """A connection that reads one snapshot. Use from one thread."""

    def __init__(self, sock: socket.socket, request: dict[str, object]) -> None:
        """Take over `sock`, authenticated, and read the head; see `fetch`."""
        self._sock = sock
        self._request = request
        self.head = Head.parse(bytes(self._ask({"op": "head"}, HEAD_BYTES_MAX)))

    def blocks(self) -> Iterator[memoryview]:
        """The data in order, a chunk at a time, each checked; valid until the next is asked for.

        The next range travels while this one is used: at most 32 MiB are held.

        Raises:
          IntegrityError: a chunk is damaged, or the snapshot is no longer there.
          WireError: the server is gone, silent or mad.
        """
        total, size = self.head.sealed.data_bytes, self.head.sealed.chunk_bytes
        stride = RANGE_BYTES_MAX // size * size
        spans = [(at, min(stride, total - at)) for at in range(0, total, stride)]
        if spans:
            self._request_range(*spans[0])
        chunk = 0
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
    """Open a snapshot in a remote arena. Blocks until its head has been read and checked.

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
    """The sealed snapshots that a byte server has. Blocks.

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
            )
            for found in answer["copies"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise ProtocolError(f"byte server at {address} sent no list of copies") from error
    finally:
        line.close()


def _natural(request: dict[str, Any], key: str) -> int:
    value = request.get(key)
    if type(value) is not int or value < 0:
        raise ProtocolError(f"{key} must be a natural number, not {value!r:.80}")
    return value


def _range(arena: Arena, sealed: Sealed, request: dict[str, Any]) -> memoryview:
    at, count = _natural(request, "at"), _natural(request, "bytes")
    if count > RANGE_BYTES_MAX or at + count > sealed.data_bytes:
        raise ProtocolError(
            f"bytes {at} to {at + count} were asked for; the snapshot has {sealed.data_bytes}, and "
            f"at most {RANGE_BYTES_MAX} are sent at once"
        )
    return arena.data(sealed)[at : at + count]


def _send_bytes(sock: socket.socket, data: memoryview) -> None:
    send_message(sock, {"bytes": len(data)})
    sock.sendall(data)
    data.release()
