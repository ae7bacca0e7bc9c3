"""Costs: what drills have cost in training time, and what the next one is expected to. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass

from ftkit.core.samples import quantile
from ftkit.launch.programme.record import DrillRecord

#: So many of the newest drills of a fault say what the next one will cost.
RECENT = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """At most `lost_s` of training time may go to drills within any `window_s`."""

    lost_s: float
    window_s: float


def expected_s(records: Iterable[DrillRecord], fault: str, *, prior_s: float) -> float:
    """What the next drill of this fault is taken to cost: 19 of 20 cost less.

    `prior_s` counts as one that was seen: with fewer than twenty drills it is the measure, unless
    one cost more, and a hundred that cost little make it forgotten. What is not known to be over
    may have cost more than what was measured of it, and counts as the prior at least.
    """
    mine = [r for r in records if r.fault == fault and r.struck][-RECENT:]
    costs = [
        r.lost_s if r.survived and r.lost_s is not None else max(prior_s, r.lost_s or 0.0)
        for r in mine
    ]
    return quantile([*costs, prior_s], 0.95)


def spent_s(records: Iterable[DrillRecord], job: str, *, since: float, prior_s: float) -> float:
    """What drills of this job have cost since a moment (Unix time)."""
    return sum(
        prior_s if r.lost_s is None else r.lost_s
        for r in records
        if r.job == job and r.struck and r.at >= since
    )


def prior(max_stall_s: float) -> float:
    """What a drill costs that nobody has seen yet: the longest that a job waits before it acts.

    A node that nobody reaches is given up after twice the stall (`config.Times.node_s`).
    """
    return 2 * max_stall_s
