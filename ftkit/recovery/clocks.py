"""Clocks: what a stage that is still slow would have to be clocked at, and the port that sets it.

Pure but for the port. Re-clocking comes last: what a division of slots or layers evens out costs no
power and no wear. Time falls with the clock only in what is bound by compute, so the plan says
what it assumes, and stays within what the device allows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class ClockRange:
    """What one device can run at, in MHz."""

    now: int
    lowest: int
    highest: int

    def __post_init__(self) -> None:
        if not 0 < self.lowest <= self.now <= self.highest:
            raise ValueError(f"a clock lies between its limits, got {self}")


class ClockGovernor(Protocol):
    """Sets the clock of this process's accelerator. Calls may block for some milliseconds."""

    def range(self) -> ClockRange:
        """What it runs at, and could. OSError when the device does not say."""

    def lock(self, mhz: int) -> None:
        """Hold the clock at `mhz`. PermissionError where that takes more rights."""

    def release(self) -> None:
        """Let the device choose again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reclock:
    """The clock one rank should have."""

    mhz: int
    step_s: float
    """Its step with it."""


def reclock(
    step_s: Sequence[float], clocks: Sequence[ClockRange], *, bound: float = 1.0
) -> list[Reclock]:
    """Clocks with which ranks are done at the same time, as far as they go.

    The target is the least time that every rank can reach at its highest clock; those that would be
    done sooner are slowed down to it, which saves power and changes nothing else.

    Args:
      step_s: each rank's step as it runs now.
      clocks: of each rank.
      bound: share of a step that scales with the clock; the rest is memory and network.

    Raises:
      ValueError: `bound` is no share above 0.
    """
    if not 0 < bound <= 1:
        raise ValueError(f"the share bound by the clock is above 0 and at most 1, got {bound}")

    def at(step: float, clock: ClockRange, mhz: float) -> float:
        return step * ((1 - bound) + bound * clock.now / mhz)

    pairs = list(zip(step_s, clocks, strict=True))
    target = max((at(s, c, c.highest) for s, c in pairs), default=0.0)
    plan = []
    for step, clock in pairs:
        # Solved for the clock; where even the lowest is done sooner, that one.
        rest = target / step - (1 - bound)
        wanted = bound * clock.now / rest if rest > 0 else float(clock.highest)
        mhz = min(clock.highest, max(clock.lowest, round(wanted)))
        plan.append(Reclock(mhz=mhz, step_s=at(step, clock, mhz)))
    return plan
