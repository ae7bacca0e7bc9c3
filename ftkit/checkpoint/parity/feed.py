"""Feed: ranges asked for in pieces, as a gate lets them through; the next before the last is there.

A request takes a round trip, in which a link is idle unless something else is on its way. So pieces
are asked for ahead, into the next range, as far as the gate goes along: it counts what is on its way
against the window that training leaves. All ranges of one computation are one queue: whoever must
wait for the gate takes in what was asked for first, whosever it is.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from ftkit.checkpoint.gate import Gate
from ftkit.checkpoint.lines import ByteLine
from ftkit.core.errors import FtkitError
from ftkit.core.governor import Grant, Pause

#: Pieces on their way at once. A governor allows one more: whoever else asks it, such as what writes
#: checkpoints, finds room between two of ours.
FLYING_MAX = 3


class Feed:
    """Reads from lines as `ByteLine.ranges` does, through a gate. One thread's object."""

    def __init__(
        self,
        gate: Gate,
        *,
        touches: float,
        check: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        rest: Callable[[float], None] = time.sleep,
    ) -> None:
        """Ask for nothing yet.

        Args:
          gate: asked before each piece, and told when it is there.
          touches: how often a byte is read or written in memory on its way.
          check: called while the gate is closed; may raise.
          clock: seconds.
          rest: sleeps.
        """
        self._gate, self._touches, self._check = gate, touches, check
        self._clock, self._rest = clock, rest
        self._flying = deque[_Piece]()
        self._last = clock()
        """When a piece last came."""

    def ranges(
        self, line: ByteLine, request: Mapping[str, object], first: int, end: int, stride: int
    ) -> Iterator[memoryview]:
        """Bytes `first` to `end`, `stride` at a time, each valid until the next; as `ByteLine.ask`.

        Blocks while the gate is closed. One whose reader does not go on must be ended by `give_up`.
        """
        run = _Range(line, request, first, end, stride)
        for at in range(first, end, stride):
            stop = min(at + stride, end)
            limit = min(stop + stride, end)
            while run.there < stop:
                if run.failed is not None:
                    raise run.failed
                decision = self._ask(run, limit)
                if decision is None or (isinstance(decision, Pause) and self._flying):
                    self._take_in()
                elif isinstance(decision, Pause):
                    self._check()
                    self._rest(decision.seconds)
            # What is on its way travels while this range is used.
            while isinstance(self._ask(run, limit), Grant):
                pass
            yield run.view(at, stop - at)

    def give_up(self) -> None:
        """Nobody waits any more for what was asked for; without any, nothing happens."""
        self._gate.withdraw()
        for piece in self._flying:
            self._gate.given_up(piece.grant)
        self._flying.clear()

    def _ask(self, run: "_Range", limit: int) -> Grant | Pause | None:
        """Ask for the next piece before `limit`, if it may travel; None where none is to be asked for."""
        # A piece lies in one of the two buffers.
        until = min(limit, run.asked - (run.asked - run.first) % run.stride + run.stride)
        if run.asked >= until or len(self._flying) >= FLYING_MAX:
            return None
        decision = self._gate.ask(until - run.asked, whole=False, touches=self._touches)
        if isinstance(decision, Grant):
            piece = _Piece(run, run.asked, decision, self._clock())
            self._flying.append(piece)
            run.asked += decision.bytes
            run.line.ask_for(run.request, piece.at, decision.bytes)
        return decision

    def _take_in(self) -> None:
        """Receive the piece that was asked for first. Blocks."""
        piece = self._flying.popleft()
        run, count = piece.run, piece.grant.bytes
        try:
            run.line.take_in(run.view(piece.at, count))
        except (FtkitError, OSError) as error:
            self._gate.given_up(piece.grant)
            run.failed = error  # told when its own turn comes
            return
        run.there += count
        now = self._clock()
        # One that was asked for while another was on its way has waited for it.
        self._gate.arrived(piece.grant, now - max(piece.let_go, self._last))
        self._last = now


class _Range:
    """How far one reading has come. Two buffers: one is used while the other is filled."""

    def __init__(
        self, line: ByteLine, request: Mapping[str, object], first: int, end: int, stride: int
    ) -> None:
        self.line, self.request, self.first, self.stride = line, request, first, stride
        self.asked = self.there = first
        self.failed: Exception | None = None
        size = min(stride, end - first)
        self._buffers = [memoryview(bytearray(size)) for _ in range(1 + (end - first > stride))]

    def view(self, at: int, count: int) -> memoryview:
        """Where these bytes lie; of one stride."""
        number, start = divmod(at - self.first, self.stride)
        return self._buffers[number % 2][start : start + count]


@dataclass(frozen=True, slots=True, eq=False)
class _Piece:
    """Asked for, and not there yet."""

    run: _Range
    at: int
    grant: Grant
    let_go: float
