"""Growth: whether newcomers are let in now, or would cost more than they bring. Pure.

Letting somebody in makes everybody stand still for a moment, and so does losing it again. A node
that comes and goes could keep a job regrouping without ever training faster, so the gain expected
until the *newcomers* fail has to be twice the cost. Failures of others do not count: they take
somebody else, and what the newcomers bring stays.
"""

from dataclasses import dataclass

from ftkit.recovery.costs import Costs

#: The gain until the newcomers fail must be this many times the cost of growing and shrinking.
HYSTERESIS = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """Whether to grow, with both sides of it in seconds of training at the larger world's pace."""

    grow: bool
    gain_s: float
    """Saved until the newcomers fail, or the job ends."""
    cost_s: float
    """Lost to letting them in and to losing them again, with the hysteresis."""
    reason: str

    def to_json(self) -> dict[str, object]:
        return {
            "grow": self.grow,
            "gain_s": round(self.gain_s, 4),
            "cost_s": round(self.cost_s, 4),
            "reason": self.reason,
        }


def growth(
    world: int,
    newcomers: int,
    costs: Costs,
    *,
    failures_per_s: float,
    remaining_s: float | None = None,
) -> Growth:
    """Judge one growth.

    Args:
      world: ranks that train now.
      newcomers: ranks that are ready to join.
      costs: of this job.
      failures_per_s: of one newcomer, by its own record where it has one (`failure_rate`).
      remaining_s: training still to do; None: not known, and long.
    """
    larger = world + newcomers
    faster = 1 - costs.step_time(larger) / costs.step_time(world)
    stays_s = 1 / (failures_per_s * newcomers) if failures_per_s > 0 else float("inf")
    if remaining_s is not None:
        stays_s = min(stays_s, remaining_s)
    gain_s = max(0.0, faster) * stays_s if faster > 0 else 0.0
    cost_s = HYSTERESIS * (costs.grow_s + costs.regroup_s)
    grow = gain_s > cost_s
    told = f"growing from {world} to {larger} ranks saves {gain_s:.3g} s until they fail or the job ends"
    told += f", against {cost_s:.3g} s of letting them in and of losing them again"
    if faster <= 0:
        told = f"{larger} ranks are no faster than {world}"
    return Growth(grow=grow, gain_s=gain_s, cost_s=cost_s, reason=told)
