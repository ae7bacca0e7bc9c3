"""Which nodes a job is better off without, at the rates that detection gives."""

from dataclasses import replace

import pytest

from ftkit.core.ids import NodeId
from ftkit.recovery.costs import Costs
from ftkit.recovery.exclusion import (
    Exclusion,
    FailurePrices,
    NodeAdvice,
    excluded,
    swap_cost,
)

DAY = 86_400.0
#: Of the other nodes: one failure in a month.
FLEET = 1 / (30 * DAY)


def advice(
    times: dict[int, float], *, failures: int = 9, sure: bool = True
) -> dict[NodeId, NodeAdvice]:
    return {
        NodeId(n): NodeAdvice(
            failures=failures,
            failures_per_s=t * FLEET,
            fleet_per_s=FLEET,
            offender=sure,
            name=f"host{n}",
        )
        for n, t in times.items()
    }


def names(found: list[Exclusion]) -> list[int]:
    return [e.node for e in found]


def test_a_node_that_costs_more_than_it_brings_is_left_out_for_good() -> None:
    # Forty failures a month of an hour each are 5.6 % of the job; one of 63 nodes brings 1.6 %.
    found = excluded(advice({7: 40, 8: 1}), nodes=63, cost_s=3600)
    assert names(found) == [7]
    assert found[0].permanent
    assert "node 7 (host7) failed 9 times, 40.0 times the others' rate" in found[0].reason


def test_who_is_not_known_to_be_an_offender_may_come_back() -> None:
    found = excluded(advice({7: 40}, sure=False), nodes=63, cost_s=3600)
    assert not found[0].permanent


def test_one_failure_is_never_enough() -> None:
    assert not excluded(advice({3: 1e6}, failures=1), nodes=63, cost_s=1e9, spares=1)


def test_cheap_failures_do_not_cost_a_node_its_place() -> None:
    assert not excluded(advice({7: 40}), nodes=63, cost_s=10)


@pytest.mark.parametrize(
    ("times", "sure", "goes"), [(2.9, False, 0), (3, False, 1), (2.9, True, 1)]
)
def test_with_a_spare_a_node_goes_sooner_but_not_for_bad_luck(
    times: float, sure: bool, goes: int
) -> None:
    one = advice({7: times}, sure=sure)
    assert not excluded(one, nodes=63, cost_s=600)
    assert len(excluded(one, nodes=63, cost_s=600, spares=1)) == goes


def test_spares_go_to_the_worst_first() -> None:
    assert names(excluded(advice({7: 30, 9: 60}), nodes=63, cost_s=1, spares=1)) == [9]
    assert names(excluded(advice({7: 30, 9: 60}), nodes=63, cost_s=3600)) == [9, 7]


def test_nobody_fails_and_nobody_goes() -> None:
    assert not excluded({}, nodes=63, cost_s=1e9)


def test_a_change_that_costs_more_than_it_saves_is_not_made() -> None:
    # Ten failures a month more than others, at 600 s each, for a week: 1,400 s.
    more = {"nodes": 63, "spares": 1, "cost_s": 600.0, "remaining_s": 7 * DAY}
    assert names(excluded(advice({7: 11}), swap_s=1300, **more)) == [7]  # type: ignore[arg-type]
    assert not excluded(advice({7: 11}), swap_s=1500, **more)  # type: ignore[arg-type]


def test_a_node_that_is_replaced_goes_for_less_than_it_brings() -> None:
    # Ten failures a month of 120 s each are 0.05 % of the job, and one node of 63 brings 1.6 %: but
    # another brings that too, and the wait for it costs 13 s once.
    more = {"nodes": 63, "cost_s": 120.0, "remaining_s": 20 * DAY}
    assert not excluded(advice({7: 11}), **more)  # type: ignore[arg-type]
    (gone,) = excluded(advice({7: 11}), swap_s=13, **more)  # type: ignore[arg-type]
    assert "another in its place costs 13 s and saves 800 s" in gone.reason
    assert not excluded(advice({7: 11}), swap_s=900, **more)  # type: ignore[arg-type]
    # Bad luck is no reason, however cheap the change.
    unlucky = advice({7: 2.9}, sure=False)
    assert not excluded(unlucky, swap_s=0, **more)  # type: ignore[arg-type]


#: One of ten is a tenth of the work, for an hour.
TEN = Costs(world=10, replacement_s=3600)


def test_a_swap_costs_the_wait_at_the_smaller_world() -> None:
    assert swap_cost(TEN) == pytest.approx(360)
    # With fewer nobody trains.
    assert swap_cost(TEN, world_min=10) == pytest.approx(3600)


def test_a_node_is_priced_by_what_its_own_failures_take_with_them() -> None:
    prices = FailurePrices(process_s=20, node_s=14_000, node_share=0.3)
    # One that lost ten processes and never itself, and one that was lost ten times.
    assert prices.of(failures=10, nodes=0) < 0.06 * 14_000
    assert prices.of(failures=10, nodes=10) > 0.9 * 14_000
    assert prices.of(failures=0, nodes=0) == pytest.approx(0.3 * 14_000 + 0.7 * 20)
    assert FailurePrices(process_s=20, node_s=9, node_share=0).of(failures=3, nodes=0) == 20


def test_a_price_of_its_own_counts_instead_of_everybodys() -> None:
    one = {n: replace(a, cost_s=20.0) for n, a in advice({7: 11}).items()}
    more = {"nodes": 63, "cost_s": 600.0, "remaining_s": 20 * DAY}
    assert names(excluded(advice({7: 11}), swap_s=900, **more)) == [7]  # type: ignore[arg-type]
    assert not excluded(one, swap_s=900, **more)  # type: ignore[arg-type]


def test_a_node_that_is_lost_as_it_is_goes_for_nothing() -> None:
    more = {"nodes": 63, "cost_s": 1.0, "swap_s": 900.0, "remaining_s": 20 * DAY}
    assert not excluded(advice({7: 11}), **more)  # type: ignore[arg-type]
    going = {NodeId(7)}
    assert names(excluded(advice({7: 11}), going=going, **more)) == [7]  # type: ignore[arg-type]
    # Bad luck it may have been all the same.
    unlucky = advice({7: 2.9}, sure=False)
    assert not excluded(unlucky, going=going, **more)  # type: ignore[arg-type]
