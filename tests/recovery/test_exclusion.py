"""Which nodes a job is better off without."""

from ftkit.core.ids import NodeId
from ftkit.recovery.exclusion import Exclusion, NodeRecord, excluded

DAY = 86_400.0


def fleet(
    failures: dict[int, int], *, days: float = 30, nodes: int = 63
) -> dict[NodeId, NodeRecord]:
    return {
        NodeId(n): NodeRecord(failures=failures.get(n, 0), up_s=days * DAY) for n in range(nodes)
    }


def names(advice: list[Exclusion]) -> list[int]:
    return [e.node for e in advice]


def test_the_node_that_fails_and_fails_is_left_out() -> None:
    # 40 failures of one, one of each of the others in a month; an hour a failure.
    records = fleet(dict.fromkeys(range(63), 1) | {7: 40})
    advice = excluded(records, cost_s=3600)
    assert names(advice) == [7]
    assert advice[0].permanent
    assert "failed 40 times in 720 h" in advice[0].reason


def test_one_failure_is_never_enough() -> None:
    assert not excluded(fleet({3: 1}, days=1), cost_s=1e9)


def test_cheap_failures_do_not_cost_a_node_its_place() -> None:
    records = fleet(dict.fromkeys(range(63), 1) | {7: 40})
    assert not excluded(records, cost_s=10)


def test_with_a_spare_a_node_goes_sooner_but_not_for_bad_luck() -> None:
    records = fleet(dict.fromkeys(range(63), 2) | {7: 12})
    assert not excluded(records, cost_s=600)
    assert names(excluded(records, cost_s=600, spares=1)) == [7]
    assert not excluded(fleet(dict.fromkeys(range(63), 2)), cost_s=600, spares=9)


def test_a_fleet_that_never_failed_excludes_nobody() -> None:
    assert not excluded(fleet({}), cost_s=1e9)
    assert not excluded({}, cost_s=1e9)


def test_the_worst_comes_first() -> None:
    records = fleet(dict.fromkeys(range(63), 1) | {7: 30, 9: 60})
    assert names(excluded(records, cost_s=3600)) == [9, 7]


def test_a_change_that_costs_more_than_it_saves_is_not_made() -> None:
    records = fleet(dict.fromkeys(range(63), 2) | {7: 12})
    # About ten failures a month more than others, at 600 s each, for a week.
    cheap = excluded(records, cost_s=600, spares=1, swap_s=600, remaining_s=7 * DAY)
    assert names(cheap) == [7]
    assert not excluded(records, cost_s=600, spares=1, swap_s=4 * 3600, remaining_s=7 * DAY)
