"""Saving: which steps go to disk where nobody gave an interval, decided anew as costs become known. Pure.

The interval is that of `intervals.tier_intervals`, the same that `ftkit plan` prints. It begins with
what is assumed of any job. Once the pace of the steps is known a save follows at once, so that what
one costs is measured and not believed. From then on the interval moves only when it is off by more
than `HYSTERESIS`: to be off by that costs 2.5 % of a waste that is small itself, and figures that
are measured move a little all the time.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ftkit.core.errors import ProtocolError
from ftkit.core.ids import Step
from ftkit.recovery.costs import Costs
from ftkit.recovery.failure_rate import FailureRate
from ftkit.recovery.intervals import tier_intervals

#: An interval that is off by less stays. With x the ratio, the waste is (x + 1/x) / 2 of the least.
HYSTERESIS = 1.25
#: What is lost with everything is at most this much work, however rare the model takes failures to
#: be: it knows nothing of a power cut, or of somebody who ends the wrong job.
LONGEST_S = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """The steps that go to disk: `first`, and those that are whole intervals before or after it.

    All ranks must take the same steps. A change is told ahead of `first`, the next one that is due;
    where a rank hears of it late that one is incomplete, and the one after it is not.
    """

    every: int
    """Steps between two; 0 for none."""
    first: Step = Step(0)

    def due(self, step: Step) -> bool:
        """Whether the snapshot of `step` is to go to disk."""
        return self.every > 0 and (step - self.first) % self.every == 0

    def last(self, at: Step) -> Step:
        """The last one that was due, at `at` or before."""
        return Step(at - (at - self.first) % self.every) if self.every else Step(0)

    def to_json(self) -> dict[str, int]:
        return {"every": self.every, "first": self.first}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Schedule":
        """Read what `to_json` wrote. Raises ProtocolError on anything else."""
        try:
            schedule = cls(every=int(value["every"]), first=Step(int(value["first"])))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ProtocolError(f"no schedule of checkpoints: {value!r:.200}") from error
        if schedule.every < 0:
            raise ProtocolError(f"checkpoints cannot be {schedule.every} steps apart")
        return schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class Saving:
    """A schedule, and why it is that."""

    schedule: Schedule
    seconds: float
    """Between two."""
    reason: str
    paced: bool = False
    """Whether a step's time was measured when it was decided."""


def decide(
    before: Saving | None, costs: Costs, rate: FailureRate, *, at: Step, margin: int
) -> Saving | None:
    """The schedule to keep to from here on; None where that is the one before.

    Args:
      before: what is kept to now; None before the first.
      costs: of the job; `measured` says what is its own.
      rate: at which a member fails.
      at: the step that is played now.
      margin: steps ahead that a change has to be told.
    """
    steps, seconds, why = _interval(costs, rate)
    soonest = Step(at + max(1, margin))
    paced = "step_s" in costs.measured
    if before is None:
        schedule = Schedule(every=steps, first=Step(max(soonest, steps)))
        why += _assumed(costs)
    elif paced and not before.paced and "checkpoint_block_s" not in costs.measured:
        schedule = Schedule(every=steps, first=soonest)
        why += "; one is made now, to see what it costs"
    elif 1 / HYSTERESIS <= steps / before.schedule.every <= HYSTERESIS:
        return None
    else:
        due = before.schedule.last(at) + steps
        schedule = Schedule(every=steps, first=Step(max(soonest, due)))
    return Saving(schedule=schedule, seconds=seconds, reason=why, paced=paced)


def _interval(costs: Costs, rate: FailureRate) -> tuple[int, float, str]:
    """Steps, seconds, and the reason."""
    step_s = costs.step_time(costs.world)
    found = next(i for i in tier_intervals(costs, rate) if i.name == "checkpoint")
    least = max(1, math.ceil(costs.checkpoint_write_s / step_s - 1e-9))
    most = max(least, math.floor(LONGEST_S / step_s))
    steps, why = found.steps, found.reason
    if not steps or steps > most:
        steps, why = most, f"{why}; an hour apart at most"
    return steps, steps * step_s, why


def _assumed(costs: Costs) -> str:
    """What a first interval rests on that nobody has measured."""
    told = {
        "step_s": f"a step of {costs.step_time(costs.world):.3g} s",
        "checkpoint_block_s": f"{costs.checkpoint_block_s:.3g} s held up by a save",
        "checkpoint_write_s": f"{costs.checkpoint_write_s:.3g} s of writing",
    }
    missing = [what for name, what in told.items() if name not in costs.measured]
    return f"; assumed: {', '.join(missing)}" if missing else ""
