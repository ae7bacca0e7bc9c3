"""Which way back loses least: the numbers of one example, then the shape of the whole table."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftkit.recovery.costs import Costs
from ftkit.recovery.growth import growth
from ftkit.recovery.policy import APPROXIMATE, Choice, Loss, Option, Price, choose

#: 64 ranks, steps of 10 s in 512 whole slots; nobody's own, rounded.
EXAMPLE = Costs(
    world=64,
    step_s={64: 10.0},
    slots=512,
    detect_s=5,
    regroup_s=2,
    grow_s=5,
    respawn_s=0,
    replacement_s=300,
    spare_s=8,
    restart_s=90,
)
LOSS = Loss(world=64, node_lost=True, disk_steps=58)


def price(choice: Choice, option: Option) -> Price:
    return next(p for p in choice.table if p.option is option)


def test_a_replacement_in_five_minutes() -> None:
    choice = choose(LOSS, EXAMPLE)
    assert choice.option is Option.RESPAWN
    # 5 detect, 2 regroup, 5 half a step, 1/9 of 300 s slower, 5 to grow.
    assert choice.lost_s == pytest.approx(5 + 2 + 5 + 300 / 9 + 5)
    assert price(choice, Option.WAIT).lost_s == pytest.approx(5 + 2 + 5 + 300)
    # 5, 90 to restart, 58.5 steps, and smaller like the others for as long.
    assert price(choice, Option.DISK).lost_s == pytest.approx(5 + 90 + 585 + 300 / 9 + 5)
    assert choice.reason == "respawn loses 50.3 s, restart-memory would lose 138 s"


def test_a_replacement_in_four_hours_and_one_slot_a_rank() -> None:
    coarse = replace(EXAMPLE, slots=64, replacement_s=4 * 3600)
    assert choose(LOSS, coarse).lost_s == pytest.approx(12 + 14400 / 2 + 5)
    even = replace(coarse, slots=None)
    assert choose(LOSS, even).lost_s == pytest.approx(12 + 14400 / 64 + 5)


def test_a_spare_is_taken_when_it_is_ready() -> None:
    choice = choose(replace(LOSS, spares=1), EXAMPLE)
    assert choice.option is Option.SPARE
    assert choice.lost_s == pytest.approx(5 + 2 + 8 + 5)
    assert price(choose(replace(LOSS, lost=2, spares=1), EXAMPLE), Option.SPARE).barred == (
        "1 spares are ready, 2 are needed"
    )


def test_a_quick_replacement_is_worth_waiting_for_when_growing_is_dear() -> None:
    costs = replace(EXAMPLE, replacement_s=3, grow_s=60)
    assert choose(LOSS, costs).option is Option.WAIT
    assert choose(LOSS, replace(costs, replacement_s=300)).option is Option.RESPAWN


def test_shortly_before_the_end_nobody_is_waited_for() -> None:
    choice = choose(replace(LOSS, remaining_s=20), EXAMPLE)
    assert price(choice, Option.RESPAWN).lost_s == price(choice, Option.CONTINUE_SMALLER).lost_s
    assert price(choice, Option.WAIT).lost_s > choice.lost_s


def test_what_needs_more_ranks_than_are_left_waits_or_takes_a_spare() -> None:
    rigid = replace(LOSS, world_min=64)
    assert choose(rigid, EXAMPLE).option is Option.WAIT
    assert choose(replace(rigid, spares=1), EXAMPLE).option is Option.SPARE
    assert "training needs 64" in price(choose(rigid, EXAMPLE), Option.RESPAWN).barred


# ---- without the state in memory

NOWHERE = replace(LOSS, in_memory=False, snapshot_steps=None, stale_steps=100, done_steps=9000)


def test_parity_comes_before_the_disk_and_bars_what_changes_the_result() -> None:
    loss = replace(NOWHERE, parity_steps=1, allow_approximate=True)
    choice = choose(loss, EXAMPLE)
    assert choice.option is Option.PARITY
    assert price(choice, Option.STALE_SHARD).barred == "parity has the state as it was"


def test_an_approximation_is_never_taken_silently() -> None:
    assert choose(NOWHERE, EXAMPLE).option is Option.DISK
    barred = price(choose(NOWHERE, EXAMPLE), Option.STALE_SHARD).barred
    assert barred == "it changes the result; allow_approximate is off"


def test_an_approximation_is_taken_where_it_loses_less() -> None:
    asked = replace(NOWHERE, allow_approximate=True, neighbours_alive=True)
    choice = choose(asked, EXAMPLE)
    assert choice.option is Option.STALE_SHARD
    assert choice.to_json()["approximate"] is True
    dear = replace(EXAMPLE, stale_lost_steps=100, checkfree_lost_steps=100)
    assert choose(asked, dear).option is Option.DISK
    alone = replace(asked, stale_steps=None)
    assert choose(alone, EXAMPLE).option is Option.CHECKFREE  # 600 s of steps, against 670 s
    assert choose(replace(alone, disk_steps=50), EXAMPLE).option is Option.DISK
    outer = replace(alone, neighbours_alive=False, swapped=True)
    assert choose(outer, EXAMPLE).option is Option.CHECKFREE_PLUS


def test_nothing_left_begins_again() -> None:
    lost = Loss(world=4, lost=4, in_memory=False, snapshot_steps=None, done_steps=7)
    choice = choose(lost, Costs(world=4))
    assert choice.option is Option.FRESH
    assert "no other way" in choice.reason


# ---- what the protocol does today is what default costs say


@pytest.mark.parametrize("world", [2, 3, 4, 8, 64, 1000])
@pytest.mark.parametrize("node_lost", [False, True])
def test_survivors_go_on_smaller_and_the_seat_is_respawned(world: int, node_lost: bool) -> None:
    loss = Loss(world=world, node_lost=node_lost, disk_steps=1, parity_steps=1)
    assert choose(loss, Costs(world=world)).option is Option.RESPAWN


def test_with_nobody_left_the_newest_complete_snapshot_is_taken() -> None:
    loss = Loss(
        world=4, lost=4, in_memory=False, snapshot_steps=1, parity_steps=2, disk_steps=50,
        done_steps=60,
    )  # fmt: skip
    costs = Costs(world=4)
    assert choose(loss, costs).option is Option.RESTART_MEMORY
    assert choose(replace(loss, snapshot_steps=None), costs).option is Option.PARITY
    bare = replace(loss, snapshot_steps=None, parity_steps=None)
    assert choose(bare, costs).option is Option.DISK


def test_newcomers_are_let_in() -> None:
    assert growth(3, 1, Costs(world=4), failures_per_s=1e-8).grow


# ---- the table as a whole

losses = st.builds(
    Loss,
    world=st.just(8),
    lost=st.integers(1, 8),
    node_lost=st.booleans(),
    in_memory=st.booleans(),
    snapshot_steps=st.none() | st.integers(0, 5),
    parity_steps=st.none() | st.integers(0, 50),
    disk_steps=st.none() | st.integers(0, 500),
    stale_steps=st.none() | st.integers(0, 500),
    neighbours_alive=st.booleans(),
    swapped=st.booleans(),
    spares=st.integers(0, 2),
    world_min=st.integers(1, 8),
    remaining_s=st.none() | st.floats(0, 1e6),
    allow_approximate=st.booleans(),
    done_steps=st.integers(0, 1000),
)
prices = st.floats(0, 1e4)
job_costs = st.builds(
    Costs,
    world=st.just(8),
    slots=st.none() | st.integers(8, 64),
    detect_s=prices,
    regroup_s=prices,
    grow_s=prices,
    respawn_s=prices,
    replacement_s=prices,
    restart_s=prices,
    lost_bytes=st.floats(0, 1e12),
)


@given(losses, job_costs, st.sets(st.sampled_from(Option)))
def test_the_choice_is_the_least_of_a_whole_table(
    loss: Loss, costs: Costs, spent: set[Option]
) -> None:
    choice = choose(loss, costs, spent=spent)
    assert {p.option for p in choice.table} == set(Option)
    assert choice.lost_s == min(p.lost_s for p in choice.table) < math.inf
    assert not price(choice, choice.option).barred
    for p in choice.table:
        assert p.barred or all(v >= 0 for v in p.terms.values())
    if choice.option in APPROXIMATE:
        assert loss.allow_approximate
        assert not loss.in_memory
        assert loss.snapshot_steps is None
        assert loss.parity_steps is None


@given(losses, job_costs)
def test_after_two_equal_failures_something_changes(loss: Loss, costs: Costs) -> None:
    first = choose(loss, costs)
    second = choose(loss, costs, spent={first.option})
    ways = [p for p in first.table if not p.barred]
    assert (second.option is first.option) == (len(ways) == 1)


# ---- growth


def test_a_node_that_comes_and_goes_is_not_let_in() -> None:
    costs = Costs(world=4, grow_s=30, regroup_s=30)
    often = growth(3, 1, costs, failures_per_s=1 / 300)  # it fails every 5 min
    assert not often.grow
    assert often.gain_s == pytest.approx(75)
    assert often.cost_s == 120
    assert growth(3, 1, costs, failures_per_s=1 / 1000).grow
    assert not growth(3, 1, costs, failures_per_s=1 / 1000, remaining_s=300).grow


def test_in_a_large_job_the_failures_of_others_do_not_count_against_a_newcomer() -> None:
    costs = Costs(world=1000, grow_s=120, regroup_s=30)
    # Somebody fails every 90 min, and this node every two months: a thousandth more for a month.
    assert growth(999, 1, costs, failures_per_s=1 / 5.4e6, remaining_s=2.6e6).grow


def test_ranks_that_no_slot_is_left_for_are_not_let_in() -> None:
    costs = Costs(world=6, slots=8)
    assert not growth(5, 1, costs, failures_per_s=1e-9).grow
    assert "no faster" in growth(5, 1, costs, failures_per_s=1e-9).reason


# ---- costs


def test_step_times_between_the_measured_are_scaled() -> None:
    costs = Costs(world=8, step_s={8: 1.0, 4: 1.8}, slots=16)
    assert costs.step_time(4) == 1.8
    assert costs.step_time(7) == pytest.approx(1.0 * 3 / 2)
    assert costs.step_time(3) == pytest.approx(1.8 * 6 / 4)
    assert costs.kept(4) == pytest.approx(1 / 1.8)
    assert costs.kept(0) == 0.0


def test_costs_say_what_was_measured() -> None:
    costs = Costs(world=8).with_measured(detect_s=0.03, respawn_s=None, step_s={})
    assert (costs.detect_s, costs.respawn_s) == (0.03, 5.0)
    assert costs.to_json()["measured"] == ["detect_s"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"world": 0}, "a job has ranks"),
        ({"detect_s": -1}, "not negative"),
        ({"disk_bps": 0}, "some rate"),
        ({"step_s": {8: 0.0}}, "takes time"),
    ],
)
def test_costs_that_cannot_be_are_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Costs(**{"world": 8, **wrong})  # type: ignore[arg-type]


@pytest.mark.parametrize("share", ["beyond_memory", "beyond_parity"])
def test_a_share_of_failures_is_at_most_all(share: str) -> None:
    with pytest.raises(ValueError, match=f"{share} is 1.5"):
        Costs(world=4, **{share: 1.5})  # type: ignore[arg-type]


@pytest.mark.parametrize("seconds", [-1.0, float("nan")])
def test_training_still_to_do_is_a_time(seconds: float) -> None:
    with pytest.raises(ValueError, match="remaining_s"):
        Loss(world=4, remaining_s=seconds)
