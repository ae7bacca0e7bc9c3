"""How often to copy: closed forms against brute force, and the form per tier."""

import math
import random

import pytest

from ftkit.recovery.intervals import TierCost, daly, intervals, slowdown, young


@pytest.mark.parametrize(
    ("block_s", "mtbf_s", "restart_s"), [(60, 10_800, 300), (5, 10_800, 60), (120, 3600, 600)]
)
def test_dalys_interval_is_the_best_of_his_model(
    block_s: float, mtbf_s: float, restart_s: float
) -> None:
    def cost(interval_s: float) -> float:
        return slowdown(interval_s, block_s=block_s, mtbf_s=mtbf_s, restart_s=restart_s)

    best = min(cost(10.0 + i) for i in range(6000))
    assert cost(daly(block_s, mtbf_s)) <= best * 1.001
    assert cost(young(block_s, mtbf_s)) <= best * 1.01
    assert cost(4 * daly(block_s, mtbf_s)) > best * 1.02


def test_the_model_agrees_with_failures_drawn_at_random() -> None:
    block_s, mtbf_s, restart_s, work_s = 60.0, 10_800.0, 300.0, 40 * 10_800.0
    interval_s = daly(block_s, mtbf_s)
    chance = random.Random(7)
    spent = 0.0
    runs = 60
    for _ in range(runs):
        done, left = 0.0, chance.expovariate(1 / mtbf_s)
        while done < work_s:
            need = min(interval_s, work_s - done) + block_s
            if left >= need:
                left, spent, done = left - need, spent + need, done + need - block_s
                continue
            spent += left
            left = chance.expovariate(1 / mtbf_s)
            while left < restart_s:
                spent += left
                left = chance.expovariate(1 / mtbf_s)
            spent, left = spent + restart_s, left - restart_s
    expected = slowdown(interval_s, block_s=block_s, mtbf_s=mtbf_s, restart_s=restart_s)
    assert spent / (runs * work_s) == pytest.approx(expected, rel=0.02)


def test_a_copy_dearer_than_the_time_it_protects() -> None:
    assert daly(100.0, 40.0) == 40.0


def tier(name: str, **costs: float) -> TierCost:
    return TierCost(
        name=name,
        block_s=costs.get("block", 0.0),
        duration_s=costs.get("lasts", 0.0),
        failures_per_s=costs.get("rate", 0.0),
    )


def test_every_tier_has_its_own_interval() -> None:
    memory, disk = intervals(
        [tier("memory", block=0.001, rate=1e-4), tier("disk", block=5.0, lasts=60, rate=1e-6)],
        step_s=10.0,
    )
    assert (memory.steps, memory.reason) == (1, "every step")
    assert disk.seconds == pytest.approx(daly(5.0, 1e6), rel=0.01)
    assert disk.waste == pytest.approx(math.sqrt(2 * 5.0 * 1e-6), rel=0.02)
    assert "days needs it" in disk.reason


def test_no_tier_copies_more_often_than_a_copy_takes() -> None:
    (found,) = intervals([tier("disk", lasts=61, rate=1e-3)], step_s=10.0)
    assert found.steps == 7
    assert "as often as a copy of 61 s can" in found.reason


def test_a_tier_that_no_failure_needs_is_not_copied_to() -> None:
    (found,) = intervals([tier("disk", block=5)], step_s=10.0)
    assert (found.steps, found.waste, found.reason) == (0, 0.0, "no failure needs it")
