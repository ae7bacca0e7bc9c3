"""The simulated month: its arithmetic by hand, and the policy against every fixed one."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.fleet import Failure, Fixed, Month, Policy, Scenario, evenly, synthetic, titan
from benchmarks.policy import COSTS, ORDERS, Result, judge
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


def test_draws_are_spread_evenly_over_all_failures_and_change_nothing_else() -> None:
    before = [synthetic(seed, nodes=100, span_s=10 * DAY, mtbf_s=5400) for seed in range(3)]
    after = evenly(before * 2, seed=4)
    drawn = [f for history in after for f in history]
    for name in ("reach", "patience"):
        values = sorted(getattr(f, name) for f in drawn)
        assert all(i <= v * len(drawn) < i + 1 for i, v in enumerate(values)), name
    assert [[replace(f, reach=0, patience=0) for f in h] for h in after] == [
        [replace(f, reach=0, patience=0) for f in h] for h in before * 2
    ]
    assert after[:3] != after[3:], "each draw of a history is another"
    assert after == evenly(before * 2, seed=4) != evenly(before * 2, seed=5)


def test_a_quiet_week_says_that_failures_are_rare() -> None:
    policy = Policy()
    policy.begin(Scenario(name="thousand", costs=COSTS))
    first = policy.interval_s(0.0)
    assert policy.interval_s(7 * DAY) > 2 * first


def test_a_lemon_that_another_node_can_replace_goes() -> None:
    """Six failures of one node in six days; it brings a tenth, and so does the one that comes."""
    often = [
        Failure(at_s=k * DAY, node=3, node_lost=False, reach=0.5, patience=MEAN)
        for k in range(1, 7)
    ]
    others = [replace(f, at_s=f.at_s + 100, node=k) for k, f in enumerate(often[:2], 5)]
    costs = replace(BARE, replacement_s=60)
    month = Month(Scenario(name="lemon", costs=costs, span_s=30 * DAY), Policy())
    month.play(sorted([*often, *others], key=lambda f: f.at_s))
    assert month.banned == {3}


def test_a_difference_counts_in_its_standard_errors() -> None:
    scenario = replace(ALONE, span_s=10 * DAY)
    histories = [synthetic(seed, nodes=10, span_s=10 * DAY, mtbf_s=5400) for seed in range(3)]
    result = judge(scenario, histories)
    assert isinstance(result, Result)
    assert result.error > 0
    assert result.errors == pytest.approx((result.policy - result.best) / result.error)
    assert judge(scenario, histories[:1]).errors == 0
