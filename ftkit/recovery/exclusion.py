"""Exclusion: which nodes a job is better off without. Pure.

How often a node fails, and how sure that is, detection says from the history of all jobs
(`NodeAdvice`); nothing is counted here. What this adds is the price: a node is left out when what
its failures are expected to cost exceeds what it contributes, or what another in its place costs. To
exclude after *every* failure is worse than to exclude nobody: the fleet shrinks by nodes that were
merely unlucky (`benchmarks/policy.py` shows it).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ftkit.core.ids import NodeId

#: No node is left out for fewer failures, whatever they cost: one can be anything.
FAILURES_MIN = 2
#: While a spare stands ready, a node makes way for it at this many times the fleet's rate.
LEMON_TIMES = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeAdvice:
    """What detection makes of one node's failures, in this job or in all that are known."""

    failures: int
    failures_per_s: float
    """Its rate, as believed now."""
    fleet_per_s: float
    """That of the other nodes."""
    offender: bool = False
    """Whether detection is sure that it fails far more often than the others."""
    name: str = ""
    """Of the machine."""

    @property
    def times(self) -> float:
        """Its rate, in rates of the others."""
        return self.failures_per_s / self.fleet_per_s if self.fleet_per_s > 0 else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Exclusion:
    """Advice to do without a node."""

    node: NodeId
    failures_per_s: float
    """Its rate, as believed now."""
    permanent: bool
    """Whether it should not come back after a repair that found nothing."""
    reason: str


def excluded(
    advice: Mapping[NodeId, NodeAdvice],
    *,
    nodes: int,
    cost_s: float,
    spares: int = 0,
    swap_s: float = 0.0,
    remaining_s: float = math.inf,
) -> list[Exclusion]:
    """The nodes to leave out, the worst first.

    Args:
      advice: of nodes of the job; a node that is not in it has no failures.
      nodes: of the job.
      cost_s: lost seconds a failure of one node costs, all told (`policy.choose`).
      spares: nodes that could take a place at once; so many may go without making the job
        smaller.
      swap_s: lost seconds that another node in its place costs: the wait for it, above all. What
        the change saves until the job ends must be more, spare or not: a spare that is
        taken is missing at the next loss.
      remaining_s: training still to do.
    """
    failing = {n: a for n, a in advice.items() if a.failures >= FAILURES_MIN}
    found: list[Exclusion] = []
    for node in sorted(failing, key=lambda n: (-failing[n].failures_per_s, n)):
        one = failing[node]
        lost, brought = one.failures_per_s * cost_s, 1 / nodes
        if (one.failures_per_s - one.fleet_per_s) * cost_s * remaining_s < swap_s:
            continue
        if len(found) < spares:
            if not one.offender and one.times < LEMON_TIMES:
                continue
            why = "a spare stands ready"
        elif lost > brought:
            why = f"its failures cost {lost:.2%} of the job, and it brings {brought:.2%}"
        else:
            continue
        named = f" ({one.name})" if one.name else ""
        found.append(
            Exclusion(
                node=node,
                failures_per_s=one.failures_per_s,
                permanent=one.offender,
                reason=f"node {node}{named} failed {one.failures} times, {one.times:.1f} times the "
                f"others' rate; {why}",
            )
        )
    return found
