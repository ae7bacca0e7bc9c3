"""PacePlan: in a drill of pace, which rank loses time, or memory, from which step on, and how.

A rank finds its plan in the environment, as for faults that end something (`fault_plan`).
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Final

from ftkit.core.errors import UsageError

VARIABLE: Final = "FTKIT_DRILL_PACE"


class PaceFault(StrEnum):
    """How time is lost."""

    STEADY = "slow-steady"
    """Each slot takes `factor` times as long."""
    RAMP = "slow-ramp"
    """Each slot takes longer from step to step, until after 20 steps it is `factor` times."""
    BURSTS = "slow-bursts"
    """Of eight steps the first four take `factor` times as long."""
    DATA = "data-stall"
    """Reading one batch takes `seconds` longer, once."""
    GC = "gc-stall"
    """A full collection with millions of objects to look at, once."""
    LEAK = "leak"
    """Memory is taken and never given back, `bytes_per_s` of it."""


RAMP_STEPS: Final = 20
BURST_STEPS: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class PacePlan:
    """One rank's loss of time."""

    fault: PaceFault
    member: int
    step: int
    """From this step on, or in the first after it."""
    factor: float = 1.0
    seconds: float = 0.0
    bytes_per_s: float = 0.0

    def factor_at(self, step: int) -> float:
        """How many times as long work takes in `step`."""
        since = step - self.step
        if since < 0:
            return 1.0
        match self.fault:
            case PaceFault.STEADY:
                return self.factor
            case PaceFault.RAMP:
                return 1.0 + (self.factor - 1.0) * min(1.0, (since + 1) / RAMP_STEPS)
            case PaceFault.BURSTS:
                return self.factor if since % (2 * BURST_STEPS) < BURST_STEPS else 1.0
        return 1.0


def to_environ(plan: PacePlan) -> dict[str, str]:
    """The variable that tells ranks of it."""
    return {VARIABLE: json.dumps(asdict(plan))}


def from_environ(environ: Mapping[str, str], *, member: int) -> PacePlan | None:
    """The plan for `member`, if there is one. Raises UsageError when it cannot be read."""
    text = environ.get(VARIABLE)
    if not text:
        return None
    try:
        value = json.loads(text)
        plan = PacePlan(**{**value, "fault": PaceFault(value["fault"])})
    except (ValueError, TypeError, KeyError) as error:
        raise UsageError(f"{VARIABLE} holds no plan: {error}") from error
    return plan if plan.member == member else None
