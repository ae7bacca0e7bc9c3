"""StepMeter: adds up where the training thread's time goes, phase by phase, until a step is over.

It is told the time and reads three gauges of the process; see `Gauges`. Used by the training
thread alone.
"""

from collections.abc import Callable
from dataclasses import dataclass

from ftkit.core.ids import Generation, MemberId, Step
from ftkit.detection.row import PHASES, Phase
from ftkit.detection.step_record import StepRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Gauges:
    """What only the process itself can tell. Each counts seconds upwards from anywhere."""

    blocked_s: Callable[[], float] = lambda: 0.0
    """Time the calling thread has been blocked in collectives."""
    cpu_s: Callable[[], float] | None = None
    """Processor time of the calling thread."""
    gc_s: Callable[[], float] = lambda: 0.0
    """Time the process has spent in garbage collections."""
    starved_s: Callable[[], float] = lambda: 0.0
    """Time the calling thread has waited for a core."""


class StepMeter:
    """The clockwork of one rank's steps."""

    def __init__(self, gauges: Gauges, phase: Phase, now: float) -> None:
        self._gauges = gauges
        self._phase = phase
        self._open = False
        self._count = 0
        self._at = self._waited = self._blocked = self._cpu = self._gc = 0.0
        self._starved = self._starved_at = 0.0
        self._seconds: dict[Phase, float] = {}
        self._restart(now)

    def turn(self, phase: Phase, now: float) -> None:
        """The thread goes over to `phase`: what passed since the last turn was the one before."""
        blocked = self._gauges.blocked_s()
        waited = blocked - self._blocked
        if self._phase is Phase.FORWARD:
            self._starved += self._gauges.starved_s() - self._starved_at
        if phase is Phase.FORWARD:
            self._starved_at = self._gauges.starved_s()
        self._seconds[self._phase] += max(0.0, now - self._at - waited)
        self._waited += waited
        self._at, self._blocked, self._phase = now, blocked, phase

    def begin(self, now: float) -> None:
        """A step begins. What an attempt before it took that did not end is forgotten."""
        if self._open:
            self._restart(now)
        self._open = True

    def end(
        self,
        phase: Phase,
        now: float,
        *,
        member: MemberId,
        generation: Generation,
        step: Step,
        slots: int,
        loss: float | None,
        grad_norm: float | None,
        role: str,
        place: str,
    ) -> StepRecord:
        """The step is over and `phase` begins: its record, from the end of the one before it on."""
        self.turn(phase, now)
        gauges = self._gauges
        record = StepRecord(
            number=self._count,
            member=member,
            generation=generation,
            step=step,
            t_end_ns=int(now * 1e9),
            seconds={p: spent for p, spent in self._seconds.items() if spent},
            waited_s=self._waited,
            cpu_s=None if gauges.cpu_s is None else gauges.cpu_s() - self._cpu,
            gc_s=gauges.gc_s() - self._gc,
            starved_s=self._starved,
            slots=slots,
            loss=loss,
            grad_norm=grad_norm,
            role=role,
            place=place,
        )
        self._count += 1
        self._open = False
        self._restart(now)
        return record

    def _restart(self, now: float) -> None:
        gauges = self._gauges
        self._at = now
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._waited = 0.0
        self._blocked = gauges.blocked_s()
        self._cpu = gauges.cpu_s() if gauges.cpu_s else 0.0
        self._gc = gauges.gc_s()
        self._starved = 0.0
