"""The byte server: sealed snapshots of one job's arenas, read-only, to whoever joins.

An agent runs it. After the mutual challenge of `core.wire` the client sends requests, one
after another, and each is answered by one message and, on success, that many raw bytes::

    {"op": "head", "arena": name, "step": 7, "generation": 2}                 -> {"bytes": n} n bytes
    {"op": "data", ... the same ..., "at": 0, "bytes": 16777216}              -> {"bytes": n} n bytes
    {"op": "list"}                                                            -> {"copies": [...]}
    {"op": "parity-...", ...}                                     -> as `parity.holder` says

    anything wrong                        -> {"error": "...", "lost": true when it is not there}

Whoever makes the server may add operations, parity's above all.
The server promises nothing about the bytes: the reader checks every digest. A name is a bare
file name of this job's arenas and nothing else; links are not followed.
"""

import contextlib
import logging
import socket
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ftkit.checkpoint.arena import Arena
from ftkit.checkpoint.copies import arena_name, local_copies
from ftkit.checkpoint.slabs import Sealed
from ftkit.core.errors import CapacityError, IntegrityError, ProtocolError, WireError
from ftkit.core.ids import Generation, JobId, NodeId, Step
from ftkit.core.wire import authenticate, listen, receive_message, send_message

logger = logging.getLogger(__name__)

RANGE_BYTES_MAX = 16 << 20
#: Each node of a group keeps a few (`lines`), a leader one to each node of the job, and those
#: who join must get in beside them.
CONNECTIONS_MAX = 512
#: A round of parity names every part of a group, and every node of the job.
_REQUEST_BYTES_MAX = 4 << 20

Operation = Callable[[socket.socket, dict[str, Any]], None]
"""Answers a request by what it sends. Raises IntegrityError when what was asked for is not
there, ProtocolError when the request is wrong, and CapacityError; before it sends anything."""


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
        operations: Mapping[str, Operation] = {},  # never changed
    ) -> None:
        """Listen, and serve from threads of its own.

        Args:
          directory: where the arenas lie; nothing outside it is ever opened.
          job: only arenas named for this job are served.
          secret: the job's.
          host: the address to bind to.
          port: the port; 0 for any.
          idle_s: the longest silence of a client before it is dropped.
          operations: further ones, by name. They are called on the client's thread.

        Raises:
          OSError: the address cannot be bound.
        """
        self._directory = directory
        self._job = job
        self._name = arena_name(job)
        self._secret = secret
        self._idle_s = idle_s
        self._operations = operations
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
        for sock in clients:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        # All at once: a thread that makes parity looks up once a second.
        for thread in clients.values():
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
            # An answer is a message and then bytes: held back until the first has been
            # acknowledged, small ones would take 40 ms each.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
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
            operation = self._operations.get(str(request.get("op")), self._send)
            operation(sock, request)
        except IntegrityError as error:
            send_message(sock, {"error": str(error), "lost": True})
        except (ProtocolError, CapacityError) as error:
            send_message(sock, {"error": str(error), "lost": False})

    def _list(self) -> list[dict[str, object]]:
        return [
            {
                "arena": Path(copy.path).name,
                "seat": copy.seat,
                "step": copy.step,
                "generation": copy.generation,
                "part": copy.part.to_json(),
            }
            for copy in local_copies(self._job, self._directory, NodeId(0))
        ]

    def _send(self, sock: socket.socket, request: dict[str, Any]) -> None:
        name = request.get("arena")
        if not isinstance(name, str) or self._name.fullmatch(name) is None:
            raise ProtocolError(f"{name!r:.80} is not the name of an arena of this job")
        step, generation = (natural(request, key) for key in ("step", "generation"))
        try:
            arena = Arena.open(self._directory / name)
        except OSError as error:
            raise IntegrityError(f"{name} cannot be opened: {error.strerror}") from error
        with arena:
            sealed = arena.find(Step(step), Generation(generation))
            if request.get("op") == "head":
                send_bytes(sock, memoryview(arena.head_bytes(sealed)))
            elif request.get("op") == "data":
                at, count = _range(sealed, request)
                start = arena.data_offset(sealed)
                send_message(sock, {"bytes": count})
                arena.send(sock, start + at, count)
            else:
                raise ProtocolError(f"{request.get('op')!r:.80} is not an operation")


def natural(request: dict[str, Any], key: str) -> int:
    """That field of a request. ProtocolError unless it is a natural number."""
    value = request.get(key)
    if type(value) is not int or value < 0:
        raise ProtocolError(f"{key} must be a natural number, not {value!r:.80}")
    return value


def _range(sealed: Sealed, request: dict[str, Any]) -> tuple[int, int]:
    at, count = natural(request, "at"), natural(request, "bytes")
    if count > RANGE_BYTES_MAX or at + count > sealed.data_bytes:
        raise ProtocolError(
            f"bytes {at} to {at + count} were asked for; the snapshot has {sealed.data_bytes}, and "
            f"at most {RANGE_BYTES_MAX} are sent at once"
        )
    return at, count


def send_bytes(sock: socket.socket, data: memoryview) -> None:
    """Announce bytes and send them; the view is released."""
    send_message(sock, {"bytes": len(data)})
    sock.sendall(data)
    data.release()
