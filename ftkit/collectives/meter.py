"""Meter: how fast a connection is, judged by what it carries anyway.

For TCP the kernel counts what we need and we only look: bytes the peer has acknowledged, and
the time in which some were on their way. Time in which the peer's window was shut is the
peer's, not the network's, and is left out. We look, for about 2 us, when a large message
meets an idle connection and when the next message does; small messages, whose time is all
latency, do not count. Memory reads are timed by whoever makes them.
"""

import socket
import struct
from dataclasses import dataclass

#: tcpi_bytes_acked, tcpi_busy_time and tcpi_rwnd_limited of struct tcp_info (Linux 4.10).
_INFO = struct.Struct("=120xQ40xQQ")
#: A message of this size is large.
METERED_BYTES = 256 << 10
#: A rate is taken over this much, whichever comes first.
WINDOW_S = 0.1
WINDOW_BYTES = 64 << 20
#: Less says nothing: it may all have been in flight at once.
_BYTES_MIN = 256 << 10


@dataclass(frozen=True, slots=True)
class Flow:
    """What one connection carried in one direction since it stands."""

    nbytes: int
    busy_s: float
    """Seconds in which it had something to carry."""
    rate: float | None
    """Bytes a second while busy, lately; None until enough was carried to tell."""

    def __add__(self, other: "Flow") -> "Flow":
        """Two connections side by side: rates add up, and so do the bytes."""
        rates = [r for r in (self.rate, other.rate) if r is not None]
        return Flow(
            self.nbytes + other.nbytes,
            max(self.busy_s, other.busy_s),
            sum(rates) if rates else None,
        )


class Pace:
    """Bytes and busy time, counted in windows. Written by one thread, read by any."""

    __slots__ = ("_busy_s", "_nbytes", "busy_s", "nbytes", "windows")

    def __init__(self) -> None:
        self.nbytes = 0
        self.busy_s = 0.0
        self.windows: tuple[float, ...] = ()
        """Rates of the last two full windows, the newest first."""
        self._nbytes = 0
        self._busy_s = 0.0

    def add(self, nbytes: int, busy_s: float) -> None:
        """`nbytes` took `busy_s`."""
        self.nbytes += nbytes
        self.busy_s += busy_s
        self._nbytes += nbytes
        self._busy_s += busy_s
        if self._busy_s >= WINDOW_S or self._nbytes >= WINDOW_BYTES:
            self.windows = (self._nbytes / max(self._busy_s, 1e-6), *self.windows[:1])
            self._nbytes, self._busy_s = 0, 0.0

    @property
    def flow(self) -> Flow:
        if self.windows:
            rate: float | None = self.windows[0]
        else:
            rate = self._nbytes / max(self._busy_s, 1e-6) if self._nbytes >= _BYTES_MIN else None
        return Flow(self.nbytes, self.busy_s, rate)


class SocketMeter:
    """The pace at which one socket's large messages leave."""

    __slots__ = ("_acked", "_busy_us", "_sock", "open", "pace")

    def __init__(self, sock: socket.socket) -> None:
        self.pace = Pace()
        self.open = False
        """Whether what is sent now counts."""
        self._sock = sock
        self._acked = self._busy_us = 0

    def mark(self, *, bulk: bool, idle: bool) -> None:
        """A message is about to be queued: a large one or not, behind others or not."""
        if self.open and not idle:
            return
        try:
            info = self._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO.size)
        except OSError:
            return
        if len(info) < _INFO.size:
            return  # a kernel that does not count
        acked, busy_us, shut_us = _INFO.unpack(info)
        busy_us -= shut_us
        if self.open and acked > self._acked:
            self.pace.add(acked - self._acked, max(busy_us - self._busy_us, 0) / 1e6)
        self._acked, self._busy_us, self.open = acked, busy_us, bulk
