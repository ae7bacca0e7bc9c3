"""Inject: a rank does to itself what its drill has planned. Nothing at all without one."""

import ctypes
import mmap
import os
import re
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from ftkit.core.fault_plan import DESYNCS, Kind, PlannedFault, Point
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
            if fault.kind in DESYNCS:
                continue  # asked for by `slip`
            if fault.point is point and step >= fault.step and there:
                self._faults.remove(fault)
                self._strike(fault, step, nbytes)
                return

    def slip(self, step: int, *, bucket: int, last: bool) -> Kind | None:
        """How this rank is to differ from the others in the reduction of `bucket`; None: not."""
        for fault in self._faults:
            there = last or bucket >= fault.bucket
            if fault.kind in DESYNCS and step >= fault.step and there:
                self._faults.remove(fault)
                self._note(fault, step)
                return fault.kind
        return None

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
            _DEEDS[fault.kind](fault, step)

    def _signal_later(self, fault: PlannedFault, step: int) -> None:
        time.sleep(fault.delay_s)  # into the middle of what the training thread does now
        self._signal(fault, step)

    def _signal(self, fault: PlannedFault, step: int) -> None:
        self._note(fault, step)
        os.kill(os.getpid(), signal.SIGKILL if fault.kind is Kind.KILL else signal.SIGSTOP)

    def _note(self, fault: PlannedFault, step: int) -> None:
        self._trace.event("drill", fault=fault.kind.value, phase=fault.point.value, step=step)


def _raise(fault: PlannedFault, step: int) -> None:
    raise DrillError(f"a drill raised this {fault.point} of step {step}")


def _sleep(fault: PlannedFault, step: int) -> None:
    while True:
        time.sleep(3600)  # the fault itself: a training thread that never comes back


def _exit(fault: PlannedFault, step: int) -> None:
    os._exit(1)


def _segfault(fault: PlannedFault, step: int) -> None:
    ctypes.string_at(8)


def _abort(fault: PlannedFault, step: int) -> None:
    os.abort()


def _run_out_of_memory(fault: PlannedFault, step: int) -> None:
    """Ask for more than the address space may still grow by.

    In one piece: other threads, some of them native code that does not look, keep what they need.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * mmap.PAGESIZE
    resource.setrlimit(resource.RLIMIT_AS, (mapped + (256 << 20), hard))
    bytearray(1 << 30)


def _pause(fault: PlannedFault, step: int) -> None:
    # Somebody else has to wake it.
    subprocess.Popen(["/bin/sh", "-c", f"sleep {fault.lasts_s}; kill -CONT {os.getpid()}"])
    os.kill(os.getpid(), signal.SIGSTOP)


def _hold_the_interpreter(fault: PlannedFault, step: int) -> None:
    # Backtracks through 2 ** 60 ways to match, and never lets another thread run.
    re.match(r"(a+)+$", "a" * 60 + "b")


def _spin(fault: PlannedFault, step: int) -> None:
    while True:
        pass


def _deadlock(fault: PlannedFault, step: int) -> None:
    lock = threading.Lock()
    with lock:
        lock.acquire()


#: What a training thread does to itself.
_DEEDS: Final[Mapping[Kind, Callable[[PlannedFault, int], None]]] = {
    Kind.RAISE: _raise,
    Kind.HANG: _sleep,
    Kind.EXIT: _exit,
    Kind.SEGFAULT: _segfault,
    Kind.ABORT: _abort,
    Kind.OOM: _run_out_of_memory,
    Kind.PAUSE: _pause,
    Kind.GIL_HANG: _hold_the_interpreter,
    Kind.SPIN: _spin,
    Kind.DEADLOCK: _deadlock,
}
