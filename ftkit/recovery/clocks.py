"""Clocks: how much faster a smaller world can be clocked, and the port that sets a clock. Pure but for that.

While ranks are away, those that are left have their work to do as well. Where an operator has capped
clocks (power, heat), the cap may be lifted for that while: it costs power, and is given back once the world
is full. Time falls with the clock only in what is bound by compute, so the share of a step that is has
to be said. ElasWave (arXiv 2510.00606) calls this the frequency dimension.
"""

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


def speedup(gain: float, bound: float) -> float:
    """How many times as fast a step is with the clock `gain` times as high (Amdahl).

    Args:
      gain: the new clock over the old one.
      bound: share of a step that scales with the clock; the rest is memory and network.

    Raises:
      ValueError: `gain` is not above 0, or `bound` is no share.
    """
    if not gain > 0 or not 0 <= bound <= 1:
        raise ValueError(f"a gain is above 0 and a share in 0..1, got {gain} and {bound}")
    return 1 / ((1 - bound) + bound / gain)
