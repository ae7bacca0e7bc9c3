"""Cusum: evidence that adds up over steps, and how much of it is enough for a stated budget.

Page's one-sided sum of log residuals, S <- max(0, S + x) with x = clip(e - k). A log residual
means the same at any step time: +10 % is 0.095. The threshold h is calibrated on the job's own
residuals, not on a normal distribution: those of real jobs have heavier tails, and a table for
the normal one was 35 to 340 times too optimistic on recorded jobs.

By Wald's identity an excursion of S passes h with a probability of at most exp(-theta h), where
theta > 0 solves E[exp(theta x)] = 1, and it takes a step with x > 0 to begin one. So h =
log(rank-steps between false alarms * P[x > 0]) / theta keeps the budget. Residuals of neighbouring
steps may be correlated: theta is also solved for sums over blocks of steps, and the smaller one
counts.

What was not among n residuals may still come, with a probability of about 1 / (n + 1). So one step
adds at most an m-th part of h, with m such that m of them in a row keep the budget as well: eight
after six residuals, three once there are some hundred.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

#: Steps that have to speak for a verdict, whatever they say: one odd step, or two, is none.
STEPS_MIN: Final = 3

#: Steps of one member that are summed to see how far neighbouring residuals hang together.
BLOCK_STEPS: Final = 8

#: Sums kept at most this many thresholds high, so that what is over is soon over.
_CEILING: Final = 2.0

#: Fewer blocks than this say nothing about a tail.
_BLOCKS_MIN: Final = 32

#: With n residuals theta is known to about its (6 / sqrt(n))-th part.
_SHORTAGE: Final = 6.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Threshold:
    """What a sum is held against. All in log units."""

    k: float
    """Taken off each residual: half of what is to be found, or half the noise."""
    h: float
    sigma: float
    """Of the residuals, from their median absolute deviation."""
    samples: int
    """Residuals that it was calibrated on."""
    steps: int = STEPS_MIN
    """That have to speak, whatever they say."""

    def increment(self, residual: float) -> float:
        """What one residual adds: at most so small a part of h that `steps` are needed."""
        most = self.h / self.steps
        return min(most, max(-most, residual - self.k))


@dataclass(slots=True)
class Cusum:
    """The sum of one member."""

    sum: float = 0.0
    since: float = 0.0
    """When it last left zero."""
    steps: int = 0
    """Steps since then."""

    def push(self, residual: float, threshold: Threshold, *, at: float) -> bool:
        """Add the residual of a step that ended at `at`. Returns whether it is over h."""
        if self.sum <= 0.0:
            self.since, self.steps = at, 0
        self.sum = min(_CEILING * threshold.h, self.sum + threshold.increment(residual))
        if self.sum <= 0.0:
            self.sum, self.steps = 0.0, 0
            return False
        self.steps += 1
        # So many parts of h are h, but for the rounding.
        return self.sum >= threshold.h * (1 - 1e-9)


def calibrate(
    residuals: Sequence[Sequence[float]], *, effect: float, steps_between: float
) -> Threshold:
    """The threshold that keeps false alarms `steps_between` rank-steps apart.

    Args:
      residuals: of each member that is not a suspect, in order of steps.
      effect: the smallest slowdown to be found, as a fraction: 0.1 for +10 %.
      steps_between: rank-steps for each false alarm that is allowed.

    Returns:
      A threshold that is never below what its `steps` of `effect` add up to: the tail of few
      residuals says nothing of what was not among them. Costs about 50 passes over them.
    """
    values = [e for series in residuals for e in series]
    sigma = spread(values)
    k = max(0.5 * math.log1p(effect), 0.5 * sigma)
    least = steps_needed(len(values), steps_between)
    h = floor = least * 0.5 * math.log1p(effect)
    shortage = 1.0 + _SHORTAGE / math.sqrt(len(values)) if values else math.inf
    if not values:
        return Threshold(k=k, h=math.inf, sigma=sigma, samples=0)
    # The clip depends on h: three rounds settle it.
    for _ in range(3):
        trial = Threshold(k=k, h=h, sigma=sigma, samples=len(values), steps=least)
        steps = [[trial.increment(e) for e in series] for series in residuals]
        flat = [x for series in steps for x in series]
        theta = _root(flat)
        # As if one more had been up: of few residuals none may have been.
        begun = (sum(x > 0 for x in flat) + 1) / len(flat)
        wanted = max(0.0, math.log(steps_between * begun))
        blocks = [
            sum(series[i : i + BLOCK_STEPS])
            for series in steps
            for i in range(0, len(series) - BLOCK_STEPS + 1, BLOCK_STEPS)
        ]
        if len(blocks) >= _BLOCKS_MIN:
            theta = min(theta, _root(blocks))
        needed = math.inf if theta <= 0 else wanted / theta * shortage
        if abs(needed - h) < 0.01 * h:
            break
        h = max(floor, needed)
        if math.isinf(h):
            break
    return Threshold(k=k, h=h, sigma=sigma, samples=len(values), steps=least)


def steps_needed(samples: int, steps_between: float) -> int:
    """How many odd steps in a row are no accident, after so many residuals that were not odd.

    One comes with a probability of up to 1 / (samples + 1), and any of `steps_between` rank-steps
    may begin a row: m >= log(steps_between / samples) / log(samples + 1).
    """
    if samples < 1:
        return STEPS_MIN
    wanted = math.log(max(1.0, steps_between / samples)) / math.log(samples + 1)
    return max(STEPS_MIN, math.ceil(wanted - 1e-9))


def spread(values: Sequence[float]) -> float:
    """The standard deviation of a normal sample with this median absolute deviation."""
    if len(values) < 2:
        return 0.0
    middle = median(values)
    return 1.4826 * median([abs(v - middle) for v in values])


def median(values: Sequence[float]) -> float:
    """Of a sequence that is not empty; of an even number the mean of the two in the middle."""
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else 0.5 * (ordered[half - 1] + ordered[half])


def _root(steps: Sequence[float]) -> float:
    """Theta > 0 with E[exp(theta x)] = 1; infinite when no step is up, 0 when the mean is."""
    if not steps or sum(steps) >= 0:
        return 0.0
    if max(steps) <= 0:
        return math.inf
    top, count = max(steps), len(steps)

    def over(theta: float) -> bool:
        # Scaled by the largest term, so that nothing overflows.
        return math.log(sum(math.exp(theta * (x - top)) for x in steps) / count) + theta * top > 0

    high = 1.0
    while not over(high):
        high *= 2
        if high > 1e9:
            return math.inf
    low = 0.0 if high == 1.0 else high / 2
    for _ in range(20):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if over(middle) else (middle, high)
    return low
