"""Who is struck when several are, and where."""

from typing import Any

import pytest

from ftkit.core.errors import UsageError
from ftkit.core.fault_plan import Kind, Point
from ftkit.launch.checker import Answer, Outcome
from ftkit.launch.drill_plan import choose
from ftkit.launch.multi_drills import DOUBLE, LOSE_DURING_RECOVERY, RANK_0, TRIPLE
from ftkit.launch.rot_drills import ALL_NODES, judge_all_nodes


@pytest.mark.parametrize(("fault", "count"), [(DOUBLE, 2), (TRIPLE, 3)])
@pytest.mark.parametrize("at", [None, "backward:1", "recovery", "in-collective"])
def test_several_are_killed_in_the_same_step(fault: str, count: int, at: str | None) -> None:
    for seed in range(10):
        faults = choose(fault, at, seed=seed, nproc=4, steps=60).faults()
        assert len({f.seat for f in faults}) == count
        assert len({(f.step, f.point) for f in faults}) == 1
        assert {f.kind for f in faults} == {Kind.KILL}
        assert faults[0].point is not Point.RECOVERY, "nobody is in it yet"


def test_the_second_is_killed_as_it_enters_the_world_without_the_first() -> None:
    first, second = choose(LOSE_DURING_RECOVERY, None, seed=3, nproc=3, steps=60).faults()
    assert (first.point, second.point) == (Point.FORWARD, Point.RECOVERY)
    assert first.seat != second.seat


def test_rank_0_is_rank_0() -> None:
    for seed in range(5):
        (one,) = choose(RANK_0, None, seed=seed, nproc=2, steps=60).faults()
        assert one.seat == 0


@pytest.mark.parametrize(("fault", "needs"), [(DOUBLE, 3), (TRIPLE, 4), (RANK_0, 2)])
def test_somebody_has_to_survive(fault: str, needs: int) -> None:
    with pytest.raises(UsageError, match=f"--nproc {needs} or more"):
        choose(fault, None, seed=0, nproc=needs - 1, steps=60)


def loss(*formed: int) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = [
        {"mono": 1.0, "kind": "checkpoint", "step": 6},
        {"mono": 2.0, "kind": "checkpoint", "step": 12},
        {"mono": 3.0, "kind": "drill", "step": 12},
    ]
    return [
        *events,
        *({"mono": 4.0, "kind": "decision", "action": "form", "step": s} for s in formed),
    ]


@pytest.mark.parametrize(
    ("formed", "answer"), [((12,), Answer.PASS), ((6,), Answer.FAIL), ((), Answer.FAIL)]
)
def test_a_job_without_memory_goes_on_from_its_newest_checkpoint(
    formed: tuple[int, ...], answer: Answer
) -> None:
    outcome = Outcome(
        outcome=Answer.PASS, fault=ALL_NODES, phase="any", seed=0, detect_s=None, repair_s=None,
        steps_lost=0, samples_lost=0, samples_doubled=0, survivor_exits=0, params_equal=True,
        verdict=None, evidence={"problems": [], "missing": []},
    )  # fmt: skip
    assert judge_all_nodes(outcome, loss(*formed)).outcome is answer
