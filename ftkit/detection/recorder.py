"""Recorder: how a rank says where it stands, in a few microseconds and without waiting.

It keeps the row and the rings of one seat. Collectives report through `enter` and `leave`
from whatever thread runs them; the training thread reports phases and steps; a thread of the
recorder's own stamps the heartbeat and nothing else, so that a training thread which holds
the interpreter, or a process which is not scheduled, shows as a heartbeat that stands still.
"""

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from ftkit.core.clock import Clock, MonotonicClock
from ftkit.core.ids import Generation, Step
from ftkit.detection.meter import Gauges, StepMeter
from ftkit.detection.row import WARM, Phase, op_bytes
from ftkit.detection.seat_writer import SeatWriter
from ftkit.detection.step_record import PLACE_BYTES, ROLE_BYTES, label

#: Names of ops that are kept.
_OPS_MAX = 1024


class Recorder:
    """Writes one seat of the board. Thread-safe; not to be called from a signal handler."""

    def __init__(
        self,
        writer: SeatWriter,
        clock: Clock,
        *,
        heartbeat_interval_s: float | None = None,
        gauges: Gauges | None = None,
    ) -> None:
        """Begin to record through `writer`, which becomes the recorder's own.

        Args:
          writer: from `StatusBoard.attach`; the board must outlive the recorder's `close`.
          clock: CLOCK_MONOTONIC in a rank, so that the agent can compare.
          heartbeat_interval_s: seconds between two heartbeats; None starts no thread.
          gauges: what the process says of itself; read on the training thread.
        """
        if heartbeat_interval_s is not None and not heartbeat_interval_s > 0:
            raise ValueError(f"heartbeat_interval_s is {heartbeat_interval_s}, must be positive")
        self._writer = writer
        self._clock = clock
        # The clock of a rank is asked twice a collective.
        self._now_ns: Callable[[], int] = (
            time.monotonic_ns
            if isinstance(clock, MonotonicClock)
            else lambda: int(clock.now() * 1e9)
        )
        self._lock = threading.Lock()
        #: (group, seq) of every pending collective -> its place in the ring
        self._pending: dict[tuple[int, int], int] = {}
        #: op -> its name as it is stored
        self._ops: dict[str, bytes] = {}
        self._allowances: list[int] = []
        self._stepped = False
        self._meter = StepMeter(gauges or Gauges(), Phase.STARTING, clock.now())
        self._role = self._place = ""
        self._closed = False
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        with self._lock:
            writer.publish(self._now_ns())
        if heartbeat_interval_s is not None:
            writer.beat(self._now_ns())
            self._thread = threading.Thread(
                target=self._beat, args=(heartbeat_interval_s,), name="ftkit-heartbeat", daemon=True
            )
            self._thread.start()

    def adopt(self, generation: Generation) -> None:
        """Join a generation: collectives count anew, and what was pending has failed."""
        with self._lock:
            if self._closed:
                return
            writer, now = self._writer, self._now_ns()
            for place in self._pending.values():
                writer.record_leave(place, now, False)
            self._pending.clear()
            writer.generation = generation
            writer.publish(now)

    @property
    def shown(self) -> Phase:
        """The phase that the row shows."""
        return self._writer.phase

    def phase(self, phase: Phase) -> None:
        """The training thread goes over to `phase`."""
        with self._lock:
            if self._closed:
                return
            now = self._clock.now()
            self._meter.turn(phase, now)
            self._writer.phase = phase
            self._writer.publish(int(now * 1e9))

    def step(self, step: Step) -> None:
        """The training thread begins to play `step`; call it again when it plays it again."""
        with self._lock:
            if self._closed:
                return
            writer = self._writer
            if self._stepped and step > writer.step:
                writer.flags |= WARM
            self._stepped = True
            now = self._clock.now()
            self._meter.begin(now)
            writer.step = step
            writer.publish(int(now * 1e9))

    def finish(
        self, *, slots: int, loss: float | None = None, grad_norm: float | None = None
    ) -> None:
        """The step that was begun counts: leave its record. From now on it is BETWEEN.

        An attempt that does not count is never finished, and leaves none.

        Args:
          slots: of the global batch, that this member computed.
          loss: mean over those; None when the script told none.
          grad_norm: likewise.
        """
        with self._lock:
            if self._closed:
                return
            writer, now = self._writer, self._clock.now()
            writer.record_step(
                self._meter.end(
                    Phase.BETWEEN,
                    now,
                    member=writer.member,
                    generation=Generation(writer.generation),
                    step=Step(writer.step),
                    slots=slots,
                    loss=loss,
                    grad_norm=grad_norm,
                    role=self._role,
                    place=self._place,
                )
            )
            writer.phase = Phase.BETWEEN
            writer.publish(int(now * 1e9))

    def describe(self, *, role: str, place: str = "") -> None:
        """Say which work this member does; it stands in every step's record from now on.

        Args:
          role: members of one role do the same work. Printable ASCII, at most 16 characters.
          place: coordinates, such as "dp=0 pp=1 tp=0"; at most 40 characters.

        Raises:
          ValueError: one of them is something else, or longer.
        """
        label(role, ROLE_BYTES)
        label(place, PLACE_BYTES)
        with self._lock:
            self._role, self._place = role, place

    def enter(self, group: int, seq: int, op: str, nbytes: int) -> None:
        """Collective `seq` of `group` begins; the seqs of a group rise by one."""
        key = group, seq
        with self._lock:
            if self._closed:
                return
            pending, writer = self._pending, self._writer
            now = self._now_ns()
            if key in pending:  # of a group that was made anew under the same number
                writer.record_leave(pending[key], now, False)
            pending[key] = writer.record_enter(
                group, seq, self._ops.get(op) or self._learn(op), nbytes, now
            )

    def leave(self, group: int, seq: int, ok: bool) -> None:
        """Collective `seq` of `group` is over, with success or not.

        One that is not pending is passed over: it belongs to a generation that is gone.
        """
        with self._lock:
            if not self._closed and (place := self._pending.pop((group, seq), None)) is not None:
                self._writer.record_leave(place, self._now_ns(), ok)

    def awaiting(self, group: int, seq: int, members: Sequence[int]) -> None:
        """Collective `seq` of `group` waits for bytes of these members, for some time now."""
        with self._lock:
            if not self._closed and (group, seq) in self._pending:
                self._writer.await_(group, seq, members, t_ns=self._now_ns())

    @contextmanager
    def allowed(self, seconds: float) -> Iterator[None]:
        """Permit this member to stand still for `seconds` from now, until the block ends.

        Blocks may be inside each other: the latest deadline of those not ended holds.
        """
        if not (math.isfinite(seconds) and seconds >= 0):
            raise ValueError(f"an allowance is a number of seconds, 0 or more, not {seconds}")
        until = self._now_ns() + int(seconds * 1e9)
        with self._lock:
            self._allowances.append(until)
            self._tell_allowance()
        try:
            yield
        finally:
            with self._lock:
                self._allowances.remove(until)
                self._tell_allowance()

    def _tell_allowance(self) -> None:
        if not self._closed:
            self._writer.allow(max(self._allowances, default=0))

    def close(self) -> None:
        """End the heartbeat thread and record nothing more. May be called twice.

        The row stays as it is. A communication thread that reports later is passed over, so that
        the board may be closed once this returns.
        """
        with self._lock:
            self._closed = True
        self._stop.set()
        thread, self._thread = self._thread, None
        if thread is not None:
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

    def _learn(self, op: str) -> bytes:
        """Note how `op` is stored. A script makes up few names, and one that does not is bounded."""
        if len(self._ops) >= _OPS_MAX:
            self._ops.clear()
        known = self._ops[op] = op_bytes(op)
        return known

    def _beat(self, interval_s: float) -> None:
        while not self._stop.wait(interval_s):
            self._writer.beat(self._now_ns())
