"""From the history's words on nodes to where ranks start."""

from ftkit.core.ids import NodeId
from ftkit.detection.offenders import DAY_S, Offenders
from ftkit.detection.signals import NodeScored
from ftkit.launch.node_advice import advised
from ftkit.recovery.costs import Costs


def scored(faults: int, *, node: int = 1) -> NodeScored:
    """One node of thirty, with so many faults in as many days."""
    fleet = Offenders()
    for n in range(30):
        fleet.seen(f"host{n}", -60 * DAY_S)
    for day in range(faults):
        fleet.fault(f"host{node}", (day - faults) * DAY_S)
    score = fleet.score(f"host{node}", 0.0)
    return NodeScored(
        node=NodeId(node),
        name=score.node,
        at=0.0,
        faults=score.faults,
        recent=score.recent,
        rate_per_day=score.rate_per_day,
        fleet_per_day=score.fleet_per_day,
        factor=10.0,
        certainty=score.certainty,
        offender=score.offender,
    )


def test_an_offender_is_left_for_a_spare_with_the_evidence() -> None:
    told = advised([scored(8), scored(0, node=0)], Costs(world=4), nodes=4, spares=1)
    assert list(told) == [1]
    assert "node 1 (host1) failed 8 times" in told[NodeId(1)]


def test_without_a_spare_there_is_nothing_to_advise() -> None:
    assert not advised([scored(8)], Costs(world=4), nodes=4, spares=0)


def test_one_fault_moves_nobody() -> None:
    assert not advised([scored(1)], Costs(world=4), nodes=4, spares=1)
