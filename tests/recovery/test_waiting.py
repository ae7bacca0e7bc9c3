"""Whether a replacement is waited for: by price where prices are known, by the user's word always."""

import timeit

import pytest

from ftkit.recovery.costs import Costs
from ftkit.recovery.policy import Loss
from ftkit.recovery.waiting import MARGIN, MEASURED, OnLoss, Waiting, waiting

LOSS = Loss(world=4, lost=1)


def costs(*, join: float, grow: float, kept: float = 0.75) -> Costs:
    return Costs(world=4).with_measured(
        step_s={4: 1.0, 3: 1 / kept}, respawn_s=join, grow_s=grow, regroup_s=0.5
    )


def both(found: Waiting) -> tuple[float, float]:
    return found.waited.lost_s, found.smaller.lost_s


def test_a_quick_replacement_is_worth_a_dear_rebuild() -> None:
    found = waiting(LOSS, costs(join=2.0, grow=5.0))
    assert found.wait
    # What both share apart: the wait, against a quarter of it and the growth.
    waited, smaller = both(found)
    assert smaller - waited == pytest.approx(0.25 * 2.0 + 5.0 - 2.0)
    assert f"to wait loses {waited:.3g} s, to go on smaller loses {smaller:.3g} s" in found.reason
    assert found.limit_s == pytest.approx(3 * 2.0 + 1.0)


def test_a_slow_one_is_not_waited_for() -> None:
    found = waiting(LOSS, costs(join=60.0, grow=5.0))
    assert not found.wait
    assert found.reason.startswith("go on with 3 ranks: it loses less")


def test_a_wait_has_to_be_clearly_cheaper() -> None:
    close = costs(join=2.0, grow=1.7)
    waited, smaller = both(waiting(LOSS, close))
    assert waited < smaller < MARGIN * waited
    assert not waiting(LOSS, close).wait
    assert f"{MARGIN} times as cheap" in waiting(LOSS, close).reason


@pytest.mark.parametrize("missing", MEASURED)
def test_until_all_of_it_is_measured_the_safe_way_is_taken(missing: str) -> None:
    known = {"step_s": {4: 1.0}, "respawn_s": 0.1, "grow_s": 100.0}
    del known[missing]
    found = waiting(LOSS, Costs(world=4).with_measured(**known))
    assert not found.wait
    assert f"not measured yet in this job: {missing}" in found.reason


def test_what_the_user_says_wins_over_any_price() -> None:
    dear = costs(join=60.0, grow=1.0)
    found = waiting(LOSS, dear, OnLoss.WAIT)
    assert found.wait
    assert found.limit_s == float("inf")
    assert "--on-loss wait asks for it; to wait loses" in found.reason
    found = waiting(LOSS, costs(join=1.0, grow=100.0), OnLoss.SMALLER)
    assert not found.wait
    assert "--on-loss smaller asks for it" in found.reason


def test_what_cannot_be_done_is_not_done_whoever_asks() -> None:
    rigid = Loss(world=4, lost=1, world_min=4)
    assert waiting(rigid, costs(join=60.0, grow=1.0), OnLoss.SMALLER).wait
    replicated = Loss(world=4, lost=1, waits=False)
    found = waiting(replicated, costs(join=0.1, grow=99.0), OnLoss.WAIT)
    assert not found.wait
    assert "let in by those who train" in found.reason


def test_nobody_waits_for_a_node() -> None:
    gone = Loss(world=4, lost=1, node_lost=True)
    assert not waiting(gone, costs(join=0.1, grow=1e6)).wait


def test_it_is_decided_in_no_time() -> None:
    known = costs(join=2.0, grow=5.0)
    assert min(timeit.repeat(lambda: waiting(LOSS, known), number=20, repeat=5)) / 20 < 1e-3
