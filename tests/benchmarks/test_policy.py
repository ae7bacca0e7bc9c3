"""The simulated month: its arithmetic by hand, and the policy against every fixed one."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.fleet import Failure, Fixed, Month, Policy, Scenario, synthetic, titan
from benchmarks.policy import COSTS, ORDERS, judge
from ftkit.recovery.policy import Option

DAY = 86_400.0
#: Ten nodes, steps of 10 s, nothing held up by copies.
BARE = replace(
    COSTS, world=10, step_s={10: 10.0}, slots=None, parity_block_s=0, checkpoint_block_s=0,
    beyond_memory=0, beyond_parity=0, replacement_s=1000,
)  # fmt: skip
ALONE = Scenario(name="alone", costs=BARE, span_s=DAY)
#: -log(1 - patience) = 1: its replacement takes exactly the mean.
MEAN = 0.6321205588285577


def one(*, node_lost: bool = True, reach: float = 0.5) -> list[Failure]:
    return [Failure(at_s=1000, node=3, node_lost=node_lost, reach=reach, patience=MEAN)]


def always(*prefer: Option) -> Fixed:
    return Fixed("always", prefer, 3600)


def lost_s(scenario: Scenario, policy: Fixed | Policy, failures: list[Failure]) -> float:
    return (1 - Month(scenario, policy).play(failures)) * scenario.span_s


def test_a_month_without_failures_is_all_progress() -> None:
    assert Month(ALONE, always()).play([]) == pytest.approx(1.0)


def test_to_go_on_smaller_costs_a_tenth_until_the_replacement_is_in() -> None:
    # 5 to detect, 5 half a step, 2 to regroup; 0.1 of the rest of 20 + 1000; 5 to grow.
    expected = 5 + 5 + 2 + 0.1 * (1020 - 2) + 5
    assert lost_s(ALONE, always(Option.RESPAWN), one()) == pytest.approx(expected)
    # Nobody comes: a tenth of all that is left.
    expected = 12 + 0.1 * (DAY - 1012)
    assert lost_s(ALONE, always(Option.CONTINUE_SMALLER), one()) == pytest.approx(expected)


def test_to_wait_costs_the_wait() -> None:
    assert lost_s(ALONE, always(Option.WAIT), one()) == pytest.approx(5 + 5 + 1020 + 2 + 1)


def test_the_disk_costs_what_was_trained_since() -> None:
    beyond = replace(ALONE, costs=replace(BARE, beyond_memory=1, beyond_parity=1))
    # The mean: half an interval.
    late = [replace(f, at_s=3600 + 900) for f in one(node_lost=False)]
    assert lost_s(beyond, always(Option.DISK), late) == pytest.approx(1800 + 5 + 5 + 120 + 20)


def test_a_node_that_is_away_cannot_fail() -> None:
    twice = [*one(), replace(one()[0], at_s=1500)]
    assert lost_s(ALONE, always(Option.RESPAWN), twice) == lost_s(
        ALONE, always(Option.RESPAWN), one()
    )


def test_the_policy_takes_the_spare_and_then_does_without() -> None:
    scenario = replace(ALONE, spares=1)
    month = Month(scenario, Policy())
    month.play([one()[0], replace(one()[0], at_s=1100, node=4)])
    assert month.taken == {Option.SPARE: 1, Option.RESPAWN: 1}


@pytest.mark.parametrize(
    ("replacement_s", "spares", "slots"), [(14_400.0, 0, 800), (14_400.0, 2, 800)]
)
def test_the_policy_is_the_best_fixed_one_but_for_what_it_has_to_learn(
    replacement_s: float, spares: int, slots: int | None
) -> None:
    costs = replace(COSTS, world=100, step_s={100: 10.0}, slots=slots, replacement_s=replacement_s)
    scenario = Scenario(name="small", costs=costs, spares=spares, span_s=10 * DAY)
    histories = [synthetic(seed, nodes=100, span_s=10 * DAY, mtbf_s=5400) for seed in range(3)]
    result = judge(scenario, histories)
    assert len(result.fixed) == 3 * len(ORDERS)
    # Ten days are short for learning how often what fails; a month on 1,000 nodes is measured by
    # the benchmark itself.
    assert result.policy >= 0.998 * result.best
    assert result.policy > result.worst + 0.1, "and it matters"


def test_recorded_failures_are_read_into_a_month(tmp_path: Path) -> None:
    table = tmp_path / "gpus.csv"
    table.write_text(
        "SN,location,insert,remove,duration,out,event\n"
        "1,c0-0c0s0n0,2015-01-01 00:00:00,2016-01-02 00:00:00,1,FALSE,DBE\n"
        "2,c0-0c0s0n1,2015-01-01 00:00:00,2016-01-03 00:00:00,1,FALSE,OTB\n"
        "3,c0-0c0s0n2,2015-01-01 00:00:00,2016-01-04 00:00:00,1,FALSE,\n"
        "4,c0-0c0s0n0,2015-01-01 00:00:00,2016-02-20 00:00:00,1,FALSE,DBE\n"
    )
    month = titan(table, nodes=10, month=0, fold=True)
    assert [(f.at_s / DAY, f.node_lost) for f in month] == [(1.0, False), (2.0, True)]
    assert month == titan(table, nodes=10, month=0, fold=True)
    assert len(titan(table, nodes=10, month=1, fold=True)) == 1
