"""Intervals: how often to snapshot, make parity and write checkpoints, from one cost model.

A copy costs `block_s` of training each time it is made; a failure that only this tier can answer
throws away what was trained since the last copy, half an interval on average. Young (CACM 1974)
minimises the sum of the two, Daly (FGCS 2006) to a higher order. With several tiers each has the
failures of its own class, those that no quicker tier can answer, and an interval of its own.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ftkit.recovery.costs import Costs
from ftkit.recovery.failure_rate import FailureRate


def young(block_s: float, mtbf_s: float) -> float:
    """Seconds between copies, to first order: sqrt(2 w M)."""
    return math.sqrt(2 * block_s * mtbf_s)


def daly(block_s: float, mtbf_s: float) -> float:
    """Seconds of training between copies that lose least; `mtbf_s` where a copy costs more.

    Daly's higher-order estimate, good to 0.2 % of the waste for w < M / 2.
    """
    if block_s >= 2 * mtbf_s:
        return mtbf_s
    ratio = block_s / (2 * mtbf_s)
    return young(block_s, mtbf_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - block_s


def slowdown(interval_s: float, *, block_s: float, mtbf_s: float, restart_s: float) -> float:
    """Wall seconds for each second of training that stays: Daly's exact exponential model.

    Args:
      interval_s: training between two copies.
      block_s: what a copy costs.
      mtbf_s: mean time between failures, whenever they strike: in a restart too.
      restart_s: from the failure to training again.
    """
    spent = math.expm1(min(700.0, (interval_s + block_s) / mtbf_s))
    return mtbf_s * math.exp(min(700.0, restart_s / mtbf_s)) * spent / interval_s


@dataclass(frozen=True, slots=True, kw_only=True)
class TierCost:
    """What copies in one tier cost, and which failures need them."""

    name: str
    block_s: float
    """Training held up by one copy."""
    duration_s: float
    """From its begin until it counts; copies cannot come more often."""
    failures_per_s: float
    """Failures that this tier answers, and none that is quicker."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """How often one tier should copy."""

    name: str
    seconds: float
    steps: int
    waste: float
    """Share of time lost to it: held up by copies, and trained in vain."""
    reason: str


def intervals(tiers: Sequence[TierCost], *, step_s: float) -> list[Interval]:
    """The interval of each tier, in whole steps; pure.

    Each tier alone minimises w / tau + rate * tau / 2: classes of failures are disjoint, so
    the sum is least where every term is. A tier is never told to copy more often than a copy
    takes, nor than once a step.
    """
    found = []
    for tier in tiers:
        mtbf_s = 1 / tier.failures_per_s if tier.failures_per_s > 0 else math.inf
        best_s = daly(tier.block_s, mtbf_s) if math.isfinite(mtbf_s) else math.inf
        least_s = max(step_s, tier.duration_s)
        seconds = max(best_s, least_s)
        steps = max(1, round(seconds / step_s)) if math.isfinite(seconds) else 0
        steps = max(steps, math.ceil(least_s / step_s - 1e-9)) if steps else 0
        seconds = steps * step_s if steps else math.inf
        waste = tier.block_s / seconds + tier.failures_per_s * seconds / 2 if steps else 0.0
        if not steps:
            reason = "no failure needs it"
        elif least_s > best_s:
            reason = (
                "every step" if steps == 1 else f"as often as a copy of {tier.duration_s:.3g} s can"
            )
        else:
            reason = (
                f"{tier.block_s:.3g} s held up by each, one failure in {_span(mtbf_s)} needs it"
            )
        found.append(
            Interval(name=tier.name, seconds=seconds, steps=steps, waste=waste, reason=reason)
        )
    return found


def tier_intervals(costs: Costs, rate: FailureRate) -> list[Interval]:
    """How often a job with these costs should snapshot, make parity and write checkpoints."""
    per_s = rate.per_s * costs.world
    beyond = min(costs.beyond_memory, 1.0)
    last = min(costs.beyond_parity, beyond)
    tiers = [
        TierCost(
            name="snapshot",
            block_s=costs.snapshot_block_s,
            duration_s=0.0,
            failures_per_s=per_s * (1 - beyond),
        ),
        TierCost(
            name="parity",
            block_s=costs.parity_block_s,
            duration_s=costs.parity_round_s,
            failures_per_s=per_s * (beyond - last),
        ),
        TierCost(
            name="checkpoint",
            block_s=costs.checkpoint_block_s,
            duration_s=costs.checkpoint_write_s,
            failures_per_s=per_s * last,
        ),
    ]
    return intervals(tiers, step_s=costs.step_time(costs.world))


def _span(seconds: float) -> str:
    """Seconds as a person says them."""
    for unit, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"
