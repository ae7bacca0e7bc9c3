"""Pair test: how fast bytes go between two agents, each way, over one authenticated connection.

The receiver of a transfer says how much it wants, the sender answers when it stands at the socket,
and only then does the receiver's clock start: a sender that comes late is not the path's fault.
Both directions take turns. Sizes grow until a transfer takes long enough to be told from the
scheduler's noise; then it is repeated, and the shortest counts. A transfer in which either end
stood in the scheduler's queue for half of the time is not the path's fault, either, and does not
count: training uses the same cores. ::

    receiver   WANT nbytes ->                                       ; 0: I have seen enough
    sender                     <- GO, nbytes bytes, seconds queued
"""

import socket
import struct
import time
from dataclasses import dataclass, field

from ftkit.core.errors import ProtocolError, WireError
from ftkit.detection.paths import REPEATS_MIN

_WANT = struct.Struct("!I")
_GO = b"g"
_QUEUED = struct.Struct("!d")
#: Sizes of a transfer: small enough for 1 Mbit/s, large enough for 20 Gbit/s.
BYTES_MIN, BYTES_MAX = 64 << 10, 32 << 20
#: A transfer that takes this long is long enough.
LONG_ENOUGH_S = 0.015
#: More transfers than these are not made; if too few counted, the machine is too busy to tell.
TRANSFERS_MAX = 25
#: Where Linux says for how long this thread was ready to run and did not.
_SCHEDSTAT = "/proc/thread-self/schedstat"
_CHUNK = bytes(1 << 20)


@dataclass(slots=True)
class Transfers:
    """What one receiver has seen, and what it wants next. No I/O."""

    nbytes: int = BYTES_MIN
    seconds: list[float] = field(default_factory=list)
    """Of the transfers of `nbytes`."""
    smaller: tuple[int, float] | None = None
    """The last transfer that was too short to count: bytes and seconds."""
    made: int = 0
    starved: int = 0
    """Transfers that did not count because an end of it was not scheduled."""

    @property
    def result(self) -> tuple[int, tuple[float, ...]]:
        """Bytes of a transfer and the seconds of each; no seconds when nothing came through."""
        if not self.seconds and self.smaller is not None:
            return self.smaller[0], (self.smaller[1],)
        return self.nbytes, tuple(self.seconds)

    @property
    def wants(self) -> int:
        """The size of the next transfer; 0 when there were enough."""
        enough = len(self.seconds) >= REPEATS_MIN or self.made >= TRANSFERS_MAX
        return 0 if enough else self.nbytes

    def note(self, seconds: float, queued_s: float = 0.0) -> None:
        """One transfer of `wants` bytes took so long, and its ends were not scheduled so long."""
        self.made += 1
        if queued_s > seconds / 2:
            self.starved += 1
            return
        if seconds < LONG_ENOUGH_S and self.nbytes < BYTES_MAX:
            # Those before it were held up, or opened the connection's window.
            self.smaller = self.nbytes, max(seconds, 1e-9)
            factor = 4 if seconds < LONG_ENOUGH_S / 4 else 2
            self.nbytes = min(factor * self.nbytes, BYTES_MAX)
            self.seconds.clear()
            return
        self.seconds.append(max(seconds, 1e-9))


def meet(sock: socket.socket, *, first: bool, limit_s: float) -> tuple[Transfers, str]:
    """Test the path with whoever is at the other end, who must do the same. Blocks.

    Args:
      sock: connected and authenticated; stays the caller's.
      first: whether we are the first to receive; the two sides must differ.
      limit_s: when to give up, in seconds from now.

    Returns:
      What we received, and why it ended early; "" when it did not.
    """
    seen = Transfers()
    deadline = time.monotonic() + limit_s
    buffer = memoryview(bytearray(len(_CHUNK)))
    mine_done = theirs_done = False
    try:
        while not (mine_done and theirs_done):
            for receiving in (first, not first):
                if receiving:
                    mine_done = not _receive(sock, seen, buffer, deadline)
                else:
                    theirs_done = not _send(sock, deadline)
    except (WireError, OSError) as error:
        return seen, str(error) or type(error).__name__
    return seen, ""


def _receive(sock: socket.socket, seen: Transfers, buffer: memoryview, deadline: float) -> bool:
    """Ask for a transfer and time it. Returns whether one was wanted."""
    nbytes = seen.wants
    _within(sock, deadline)
    sock.sendall(_WANT.pack(nbytes))
    if not nbytes:
        return False
    if bytes(_read(sock, buffer[:1], deadline)) != _GO:
        raise ProtocolError("the sender of a pair test did not say go")
    queued_s, began, left = _queued_s(), time.perf_counter(), nbytes
    while left:
        left -= len(_read(sock, buffer[: min(left, len(buffer))], deadline))
    seconds, queued_s = time.perf_counter() - began, _queued_s() - queued_s
    (theirs,) = _QUEUED.unpack(_read(sock, buffer[: _QUEUED.size], deadline))
    # What a peer says is not trusted to be a time.
    seen.note(seconds, queued_s + (theirs if 0 <= theirs <= seconds else 0.0))
    return True


def _send(sock: socket.socket, deadline: float) -> bool:
    """Answer a wish for a transfer. Returns whether there was one."""
    (nbytes,) = _WANT.unpack(_read(sock, memoryview(bytearray(_WANT.size)), deadline))
    if not nbytes:
        return False
    if nbytes > BYTES_MAX:
        raise ProtocolError(f"a pair test of {nbytes} bytes was asked for, at most {BYTES_MAX}")
    _within(sock, deadline)
    queued_s = _queued_s()
    sock.sendall(_GO)
    chunk = memoryview(_CHUNK)
    while nbytes:
        part = chunk[: min(nbytes, len(chunk))]
        _within(sock, deadline)
        sock.sendall(part)
        nbytes -= len(part)
    sock.sendall(_QUEUED.pack(_queued_s() - queued_s))
    return True


def _read(sock: socket.socket, view: memoryview, deadline: float) -> memoryview:
    """Fill `view`."""
    filled = 0
    while filled < len(view):
        _within(sock, deadline)
        count = sock.recv_into(view[filled:])
        if not count:
            raise WireError("the other end of a pair test is gone")
        filled += count
    return view


def _queued_s() -> float:
    """For how long this thread has been ready to run and was not; 0 where Linux does not say."""
    try:
        with open(_SCHEDSTAT, "rb") as file:
            return int(file.read().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0


def _within(sock: socket.socket, deadline: float) -> None:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("the pair test took too long")
    sock.settimeout(left)
