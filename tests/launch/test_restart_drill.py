"""What is said of a job that was started again, smaller."""

from typing import Any

import pytest

from ftkit.core.errors import UsageError
from ftkit.launch.checker import Answer, Outcome
from ftkit.launch.drill_job import Job
from ftkit.launch.drill_plan import choose
from ftkit.launch.restart_drill import GROW, RESTART_SMALLER, judge, resized
from ftkit.recovery.plan import Stop

WELL = Stop(code=0, reason="every rank finished")


def events(steps: range, shares: list[list[int]], params: str = "p") -> list[dict[str, Any]]:
    told: list[dict[str, Any]] = []
    for step in steps:
        for seat, slots in enumerate(shares):
            told.append({"kind": "vote", "seat": seat, "step": step, "slots": slots})
            told.append({"kind": "commit", "seat": seat, "step": step})
    return [*told, {"kind": "final", "params": params}]


def judged(after: list[dict[str, Any]], second: Stop = WELL, reference: str = "p") -> Outcome:
    before = events(range(1, 4), [[0, 1], [2], [3]], params="half")
    return judge(
        GROW, [WELL, second], before, after, [{"kind": "final", "params": reference}], half=3, steps=6,
        slots=4, slot_size=2, seed=1,
    )  # fmt: skip


def test_it_goes_on_where_it_ended() -> None:
    outcome = judged(events(range(4, 7), [[0, 1], [2, 3]]))
    assert outcome.outcome is Answer.PASS
    assert outcome.params_equal


@pytest.mark.parametrize(
    ("after", "problem"),
    [
        (events(range(1, 7), [[0, 1], [2, 3]]), "began with step 1"),
        (events(range(4, 7), [[0, 1], [2]]), "6 samples were lost, 0 doubled"),
        (events(range(4, 7), [[0, 1, 2], [2, 3]]), "0 samples were lost, 6 doubled"),
        (events(range(4, 7), [[0, 1], [2, 3]], params="q"), "not the undisturbed run's"),
    ],
)
def test_what_goes_wrong_is_said(after: list[dict[str, Any]], problem: str) -> None:
    outcome = judged(after)
    assert outcome.outcome is Answer.FAIL
    assert problem in str(outcome.evidence["problems"])


def test_a_half_that_fails_is_said() -> None:
    outcome = judged(events(range(4, 7), [[0, 1], [2, 3]]), Stop(code=1, reason="no room"))
    assert outcome.outcome is Answer.FAIL


def test_one_fewer_or_one_more() -> None:
    assert resized(Job(nproc=3), -1).world_size == 2
    assert resized(Job(nproc=1, nodes=3), -1).world_size == 2
    assert resized(Job(nproc=1), 1).world_size == 2
    assert resized(Job(nproc=1, nodes=3), 1).world_size == 4
    assert choose(GROW, None, seed=0, nproc=1, steps=60).fault == GROW
    with pytest.raises(UsageError, match="--nproc 2 or more"):
        choose(RESTART_SMALLER, None, seed=0, nproc=1, steps=60)
