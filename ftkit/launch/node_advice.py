"""Node advice: what the history says of nodes, with its price, becomes what the plan is to avoid."""

from collections.abc import Iterable

from ftkit.core.ids import NodeId
from ftkit.detection.offenders import DAY_S
from ftkit.detection.signals import NodeScored
from ftkit.recovery.costs import Costs
from ftkit.recovery.exclusion import NodeAdvice, excluded
from ftkit.recovery.policy import Loss, choose


def advice_of(scored: NodeScored) -> NodeAdvice:
    """What recovery takes of what detection has found."""
    return NodeAdvice(
        failures=scored.faults,
        failures_per_s=scored.rate_per_day / DAY_S,
        fleet_per_s=scored.fleet_per_day / DAY_S,
        offender=scored.offender,
        name=scored.name,
    )


def advised(
    scored: Iterable[NodeScored], costs: Costs, *, nodes: int, spares: int
) -> dict[NodeId, str]:
    """Nodes that nothing should be started on while another can take it, and why.

    Args:
      scored: the newest of each node.
      costs: of the job, as far as known.
      nodes: with ranks.
      spares: further ones.
    """
    if not spares:
        return {}  # nothing can be taken elsewhere
    # A process has to be started in any case: elsewhere it costs no more.
    cost_s = choose(Loss(world=costs.world), costs).lost_s
    advice = {s.node: advice_of(s) for s in scored}
    return {e.node: e.reason for e in excluded(advice, nodes=nodes, cost_s=cost_s, spares=spares)}
