"""Exclusion: which nodes a job is better off without. Pure.

How often a node fails, and how sure that is, detection says from the history of all jobs
(`NodeAdvice`); nothing is counted here. What this adds is the price: a node is left out when what
its failures are expected to cost exceeds what another in its place costs (`swap_cost`), or, where nobody
comes, what it contributes. To exclude after *every* failure is worse than to exclude nobody: the fleet shrinks by nodes that were
merely unlucky (`benchmarks/policy.py` shows it).
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from ftkit.core.ids import NodeId
from ftkit.recovery.costs import Costs
from ftkit.recovery.failure_rate import posterior_share

#: No node is left out for fewer failures, whatever they cost: one can be anything.
FAILURES_MIN = 2
#: A node makes way for another at this many times the fleet's rate: below that it was unlucky.
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
    cost_s: float | None = None
    """Lost seconds that one of its own failures costs (`FailurePrices`); None: as any failure."""

    @property
    def times(self) -> float:
        """Its rate, in rates of the others."""
        return self.failures_per_s / self.fleet_per_s if self.fleet_per_s > 0 else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FailurePrices:
    """Lost seconds that failures cost, by what they take with them.

    The two differ by orders of magnitude, a process being back in seconds and another node in hours. At
    the mean of both a node that loses processes is priced as if it had lost itself each time, and is
    swapped for more than it costs.
    """

    process_s: float
    node_s: float
    node_share: float
    """Share of all failures that take the node."""

    def of(self, *, failures: int, nodes: int) -> float:
        """The expected price of the next failure of one that had so many, `nodes` of which took it."""
        share = posterior_share(self.node_share, nodes, failures) if self.node_share else 0.0
        return share * self.node_s + (1 - share) * self.process_s


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
    swap_s: float | None = None,
    remaining_s: float = math.inf,
    going: Collection[NodeId] = (),
) -> list[Exclusion]:
    """The nodes to leave out, the worst first.

    Args:
      advice: of nodes of the job; a node that is not in it has no failures.
      nodes: of the job.
      cost_s: lost seconds a failure of one node costs, all told (`policy.choose`), where the advice on it
        has no price of its own.
      spares: nodes that could take a place at once; so many may go without making the job
        smaller.
      swap_s: lost seconds that another node in its place costs (`swap_cost`). What the change
        saves until the job ends must be more, spare or not. None: nobody comes but spares,
        and those cost nothing.
      remaining_s: training still to do.
      going: nodes that are lost as it is: another comes in any case, and the change costs nothing.
    """
    failing = {n: a for n, a in advice.items() if a.failures >= FAILURES_MIN}
    found: list[Exclusion] = []
    for node in sorted(failing, key=lambda n: (-failing[n].failures_per_s, n)):
        one = failing[node]
        price_s = cost_s if one.cost_s is None else one.cost_s
        change_s = 0.0 if node in going else swap_s or 0.0
        lost, brought = one.failures_per_s * price_s, 1 / nodes
        saved_s = (one.failures_per_s - one.fleet_per_s) * price_s * remaining_s
        if saved_s < change_s:
            continue
        if len(found) < spares or swap_s is not None:
            if not one.offender and one.times < LEMON_TIMES:
                continue
            why = "a spare stands ready"
            if len(found) >= spares:
                why = f"another in its place costs {change_s:.3g} s and saves {saved_s:.3g} s"
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


def swap_cost(costs: Costs, *, world_min: int = 1) -> float:
    """Lost seconds that another node in the place of one costs: the wait, at the smaller world.

    A ready spare costs as much: it is missing at the next loss, and losses come in bursts. To reckon
    with the chance that all spares are taken, as if losses were independent, lost two per cent of a
    month on Titan's failures where every rank is needed.

    Args:
      costs: of the job.
      world_min: with fewer ranks nobody trains.
    """
    smaller = costs.world - 1
    kept = costs.kept(smaller) if smaller >= world_min else 0.0
    return (1 - kept) * costs.replacement_s
