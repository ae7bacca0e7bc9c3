"""Inject: a rank does to itself what its drill has planned. Nothing at all without one."""

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence

from ftkit.core.fault_plan import Kind, PlannedFault, Point
from ftkit.core.trace import Trace


class DrillError(RuntimeError):
    """The exception that the drill "raise" puts into user code."""


#: Points during which another thread strikes, because this one is busy with them.
_LASTING = frozenset({Point.ALL_REDUCE, Point.OPTIMIZER, Point.CAPTURE})


class Injector:
    """Strikes when the training thread passes the planned point. One per rank."""

    def __init__(
        self,
        faults: Sequence[PlannedFault],
        trace: Trace,
        light_fuse: Callable[[int, Callable[[], None]], None],
    ) -> None:
        """Strike as `faults` say; `light_fuse` is the data plane's, for those at a byte."""
        self._faults = list(faults)
        self._trace = trace
        self._light_fuse = light_fuse

    def at(
        self, point: Point, step: int, *, bucket: int = 0, last: bool = False, nbytes: int = 0
    ) -> None:
        """The training thread is at `point` of `step`, perhaps with the `last` bucket.

        `nbytes` is the payload of what it is about to issue.

        Raises:
          DrillError: that is what was planned.
        """
        if not self._faults:
            return
        for fault in self._faults:
            there = last or bucket >= fault.bucket
            if fault.point is point and step >= fault.step and there:
                self._faults.remove(fault)
                self._strike(fault, step, nbytes)
                return

    def _strike(self, fault: PlannedFault, step: int, nbytes: int) -> None:
        by_signal = fault.kind in (Kind.KILL, Kind.STOP)
        if by_signal and fault.point is Point.IN_COLLECTIVE:
            byte = 1 + fault.byte % max(nbytes, 1)
            self._light_fuse(byte, lambda: self._signal(fault, step))
        elif by_signal and fault.point in _LASTING:
            threading.Thread(
                target=self._signal_later, args=(fault, step), name="ftkit-drill", daemon=True
            ).start()
        elif by_signal:
            self._signal(fault, step)
        else:
            self._note(fault, step)
            if fault.kind is Kind.RAISE:
                raise DrillError(f"a drill raised this {fault.point} of step {step}")
            while True:
                time.sleep(3600)  # the fault itself: a training thread that never comes back

    def _signal_later(self, fault: PlannedFault, step: int) -> None:
        time.sleep(fault.delay_s)  # into the middle of what the training thread does now
        self._signal(fault, step)

    def _signal(self, fault: PlannedFault, step: int) -> None:
        self._note(fault, step)
        os.kill(os.getpid(), signal.SIGKILL if fault.kind is Kind.KILL else signal.SIGSTOP)

    def _note(self, fault: PlannedFault, step: int) -> None:
        self._trace.event("drill", fault=fault.kind.value, phase=fault.point.value, step=step)
