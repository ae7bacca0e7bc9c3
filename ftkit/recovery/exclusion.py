"""Exclusion: which nodes a job is better off without, from their record of failures. Pure.

A node is left out when what its failures are expected to cost exceeds what it contributes. Its
rate is a Gamma posterior that starts from the fleet's, so one failure says little and the third
says much. To exclude after *every* failure is worse than to exclude nobody: the fleet shrinks
by nodes that were merely unlucky (`benchmarks/policy.py` shows it).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ftkit.core.ids import NodeId

#: No node is left out for fewer failures, whatever they cost: one can be anything.
FAILURES_MIN = 2
#: A node with this many failures, at this many times the fleet's rate, does not come back.
LEMON_FAILURES, LEMON_TIMES = 3, 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeRecord:
    """One node's history in this job, or in all jobs that are known."""

    failures: int
    up_s: float
    """Seconds it was watched at work."""


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
    records: Mapping[NodeId, NodeRecord],
    *,
    cost_s: float,
    spares: int = 0,
    fleet_per_s: float | None = None,
    swap_s: float = 0.0,
    remaining_s: float = math.inf,
) -> list[Exclusion]:
    """The nodes to leave out, the worst first.

    Args:
      records: every node of the job.
      cost_s: lost seconds a failure of one node costs, all told (`policy.choose`).
      spares: nodes that could take a place at once; so many may go without making the job
        smaller.
      fleet_per_s: what an unknown node's rate is taken for; None: the mean of `records`.
      swap_s: lost seconds that another node in its place costs: the wait for it, above all. What
        the change saves until the job ends must be more, spare or not: a spare that is
        taken is missing at the next loss.
      remaining_s: training still to do.
    """
    count = len(records)
    if not count:
        return []
    failures = sum(r.failures for r in records.values())
    up_s = sum(r.up_s for r in records.values())
    if fleet_per_s is None:
        if not failures or up_s <= 0:
            return []
        fleet_per_s = failures / up_s
    rates = {
        node: (1 + r.failures) / (1 / fleet_per_s + r.up_s)
        for node, r in records.items()
        if r.failures >= FAILURES_MIN
    }
    advice: list[Exclusion] = []
    for node in sorted(rates, key=lambda n: (-rates[n], n)):
        rate, record = rates[node], records[node]
        lost, brought = rate * cost_s, 1 / count
        times = rate / fleet_per_s
        if (rate - fleet_per_s) * cost_s * remaining_s < swap_s:
            continue
        if len(advice) < spares:
            if times < LEMON_TIMES:
                continue
            why = "a spare stands ready"
        elif lost > brought:
            why = f"its failures cost {lost:.2%} of the job, and it brings {brought:.2%}"
        else:
            continue
        advice.append(
            Exclusion(
                node=node,
                failures_per_s=rate,
                permanent=record.failures >= LEMON_FAILURES and times >= LEMON_TIMES,
                reason=f"node {node} failed {record.failures} times in {record.up_s / 3600:.3g} h, "
                f"{times:.1f} times the fleet's rate; {why}",
            )
        )
    return advice
