"""Relay: stands between the ranks of a drill, so that real connections can be cut and slowed.

Ranks that are told of it (`core.detour`) dial each other through it. A connection begins with
one line of JSON that says which seat wants to reach whom; after it bytes are passed on as they
come, both ways. It listens on loopback only, and can read nothing of use: who is at the other
end, ranks prove to each other through it.

A whole link is as fast as a network, not as this process: what is limited by the processor would
be slower whenever the machine is busy, and look like a bad link.
"""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

#: Small, so that a slow link is felt by its sender soon.
BUFFER_BYTES = 128 << 10
CHUNK_BYTES = 16 << 10
LINE_BYTES_MAX = 4096
CONNECT_S = 5.0
#: What a whole link carries on a connection, each way, and for how long it may catch up.
BYTES_PER_S, BURST_S = 60e6, 0.005

Pair = frozenset[int]
"""Two seats."""
Way = tuple[int, int]
"""From a seat to another."""


@dataclass(eq=False)
class _Flow:
    """One connection: the end that dialled, and the one that was dialled."""

    way: Way
    ends: tuple[socket.socket, socket.socket]
    open: int = field(default=2)
    """Directions that still pass bytes."""

    @property
    def pair(self) -> Pair:
        return frozenset(self.way)


class Relay:
    """See the module. Thread-safe. `close` ends every thread it started."""

    def __init__(self) -> None:
        """Listen on a free port. Raises OSError."""
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
        self.address: tuple[str, int] = self._listener.getsockname()
        self._lock = threading.Lock()
        self._released = threading.Condition(self._lock)
        self._flows: set[_Flow] = set()
        self._cut: set[Pair] = set()
        self._held: set[Pair] = set()
        self._rates: dict[Way, float] = {}
        self._threads: list[threading.Thread] = []
        self._closed = False
        self._begin(self._accept)

    def cut(self, a: int, b: int) -> int:
        """Break all connections between two seats, and let none be made. How many there were."""
        pair = frozenset((a, b))
        with self._lock:
            self._cut.add(pair)
            broken = [flow for flow in self._flows if flow.pair == pair]
        for flow in broken:
            _shut(flow)
        return len(broken)

    def hold(self, a: int, b: int) -> None:
        """Pass nothing on between two seats, and break nothing: who waits is told nothing."""
        with self._lock:
            self._held.add(frozenset((a, b)))

    def slow(self, ways: Iterable[Way], bytes_per_s: float) -> None:
        """Pass on no more than so much on each connection, from a seat to another."""
        with self._lock:
            self._rates |= dict.fromkeys(ways, bytes_per_s)

    def heal(self) -> None:
        """Let everybody connect again, at full speed; what was held is passed on."""
        with self._lock:
            self._cut.clear()
            self._rates.clear()
            self._held.clear()
            self._released.notify_all()

    def close(self) -> None:
        """Break everything. Twice is fine."""
        with self._lock:
            self._closed = True
            self._released.notify_all()
            flows = list(self._flows)
        for flow in flows:
            _shut(flow)
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(2 * CONNECT_S)

    def _begin(self, target: object, *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)  # type: ignore[arg-type]
        with self._lock:
            self._threads = [t for t in self._threads if t.is_alive()] + [thread]
            thread.start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return  # closed
            self._begin(self._connect, sock)

    def _connect(self, sock: socket.socket) -> None:
        other: socket.socket | None = None
        try:
            sock.settimeout(CONNECT_S)
            asked = json.loads(_line(sock))
            way = int(asked["from"]), int(asked["to"])
            if frozenset(way) in self._cut:
                raise OSError("this link is cut")
            other = socket.create_connection((asked["host"], int(asked["port"])), CONNECT_S)
            for end in (sock, other):
                end.settimeout(None)
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
        except (OSError, ValueError, KeyError, TypeError):
            sock.close()
            if other is not None:
                other.close()
            return
        flow = _Flow(way, (sock, other))
        with self._lock:
            refused = self._closed or flow.pair in self._cut
            if not refused:
                self._flows.add(flow)
        if refused:
            sock.close()
            other.close()
            return
        self._begin(self._pump, flow, way, sock, other)
        self._begin(self._pump, flow, way[::-1], other, sock)

    def _pump(self, flow: _Flow, way: Way, source: socket.socket, target: socket.socket) -> None:
        due = time.monotonic()
        try:
            while data := source.recv(CHUNK_BYTES):
                if flow.pair in self._held:
                    with self._lock:
                        self._released.wait_for(lambda: self._closed or flow.pair not in self._held)
                now = time.monotonic()
                due = max(due, now - BURST_S) + len(data) / self._rates.get(way, BYTES_PER_S)
                if due > now:
                    time.sleep(due - now)
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            _shut(flow)  # whichever end broke, the other learns of it
        with self._lock:
            flow.open -= 1
            if flow.open:
                return
            self._flows.discard(flow)
        for end in flow.ends:
            end.close()


def _shut(flow: _Flow) -> None:
    for end in flow.ends:
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


def _line(sock: socket.socket) -> bytes:
    """The first line, and not a byte more. ValueError when it is too long or ends early."""
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = sock.recv(1)
        if not byte or len(line) >= LINE_BYTES_MAX:
            raise ValueError("no line")
        line += byte
    return bytes(line)
