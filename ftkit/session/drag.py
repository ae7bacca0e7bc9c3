"""Drag: a rank loses time, or memory, on purpose, as its drill has planned. Nothing at all without one."""

import gc
import time
from collections.abc import Callable

from ftkit.core.pace_plan import PaceFault, PacePlan
from ftkit.core.trace import Trace

#: A planned leak stops there: the machine is not only ours.
LEAKED_BYTES_MAX = 512 << 20

#: Objects that a planned collection has to look at: about 0.2 s of work.
_OBJECTS = 2_000_000


class Drag:
    """Called by the training thread at the borders of each slot. One per rank."""

    def __init__(self, plan: PacePlan | None, trace: Trace, starved_s: Callable[[], float]) -> None:
        """Do as `plan` says; `starved_s` counts how long the thread was given no core."""
        self._plan = plan
        self._starved_s = starved_s
        self._trace = trace
        self._told = False
        self._began = 0.0
        self._leaked: list[bytes] = []
        self._leaking_since: float | None = None

    def loading(self, step: int) -> None:
        """A batch is about to be read."""
        plan = self._plan
        if plan is not None and plan.fault is PaceFault.DATA and self._due(plan, step):
            time.sleep(plan.seconds)

    def began(self, step: int) -> None:
        """The work for a slot begins."""
        plan = self._plan
        if plan is None:
            return
        if plan.fault is PaceFault.GC and self._due(plan, step):
            hoard = [[i] for i in range(_OBJECTS)]
            gc.collect()
            hoard.clear()
        self._began = self._own_s()

    def ended(self, step: int) -> None:
        """The work for a slot has ended: it is to have taken so many times as long."""
        plan = self._plan
        if plan is not None and plan.fault is PaceFault.LEAK and step >= plan.step:
            self._leak(plan, step)
        if plan is None or (factor := plan.factor_at(step)) <= 1.0:
            return
        took = self._own_s() - self._began
        self._tell(plan, step)
        time.sleep((factor - 1.0) * took)

    def _leak(self, plan: PacePlan, step: int) -> None:
        """Take what is due by now. Written to, or the kernel would not give it."""
        now = time.monotonic()
        if self._leaking_since is None:
            self._leaking_since = now
            self._tell(plan, step)
        due = min((now - self._leaking_since) * plan.bytes_per_s, LEAKED_BYTES_MAX)
        self._leaked.append(b"\x01" * max(0, int(due) - sum(map(len, self._leaked))))

    def _own_s(self) -> float:
        """Time that is the thread's own: a busy host is not to be multiplied."""
        return time.monotonic() - self._starved_s()

    def _due(self, plan: PacePlan, step: int) -> bool:
        """Whether what happens once happens now."""
        if self._told or step < plan.step:
            return False
        self._tell(plan, step)
        return True

    def _tell(self, plan: PacePlan, step: int) -> None:
        if not self._told:
            self._told = True
            self._trace.event("drill", fault=plan.fault.value, phase="forward", step=step)
