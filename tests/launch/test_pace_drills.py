"""Drills of pace: what the seed decides, what ranks do of it, and how what was said is judged."""

from pathlib import Path
from typing import Any

import pytest

from ftkit.core import pace_plan
from ftkit.core.errors import UsageError
from ftkit.core.pace_plan import PaceFault, PacePlan
from ftkit.core.trace import Trace
from ftkit.launch.checker import Answer, Outcome
from ftkit.launch.drill_plan import choose
from ftkit.launch.pace_drills import CATALOGUE, SLOW_RANK, choose_pace, judge_pace, judge_two
from ftkit.session.drag import Drag

PLAN = PacePlan(fault=PaceFault.STEADY, member=1, step=30, factor=1.5)
BEFORE = Outcome(
    outcome=Answer.PASS,
    fault="slow-steady",
    phase="any",
    seed=0,
    detect_s=None,
    repair_s=None,
    steps_lost=0,
    samples_lost=0,
    samples_doubled=0,
    survivor_exits=0,
    params_equal=True,
    verdict=None,
    evidence={"problems": [], "missing": []},
)


def event(mono: float, kind: str, **fields: Any) -> dict[str, Any]:
    return {"mono": mono, "kind": kind, **fields}


def said(mono: float, fault: str, seat: int, factor: float = 1.5) -> dict[str, Any]:
    return event(
        mono,
        "verdict",
        fault=fault,
        seat=seat,
        member=seat,
        reason=f"{fault} {seat}",
        evidence={"factor": factor},
    )


def story(*more: dict[str, Any]) -> list[dict[str, Any]]:
    commits = [event(30.0 + n, "commit", step=30 + n) for n in range(8)]
    return [*commits, event(30.5, "drill", fault="slow-steady", seat=1, member=1), *more]


def judged(*more: dict[str, Any], plan: PacePlan = PLAN) -> Outcome:
    return judge_pace(BEFORE, story(*more), plan)


def test_the_right_rank_by_the_right_name_with_the_right_factor_passes() -> None:
    again = said(38.0, "slow", 1, 1.2)
    outcome = judged(said(34.5, "slow", 1, 1.45), said(35.0, "imbalance", 0), again)
    assert outcome.outcome is Answer.PASS
    assert (outcome.evidence["factor"], outcome.evidence["true_factor"]) == (1.45, 1.5)
    assert outcome.evidence["detect_steps"] == 4


@pytest.mark.parametrize(
    ("events", "text"),
    [
        ([], "never called slow"),
        ([said(34.0, "data-stall", 1)], "never called slow"),
        ([said(34.0, "slow", 2)], "seat 2 was accused"),
        ([said(34.0, "slow", 1), said(36.0, "slow", 2)], "seat 2 was accused"),
        ([said(34.0, "slow", 1), said(36.0, "hang-blocked", 1)], "seat 1 was accused"),
        ([said(34.0, "slow", 1, 2.5)], "estimated as 2.5"),
        ([said(29.0, "slow", 1)], "before anything happened"),
        ([said(34.0, "slow", 1), event(35.0, "halt", reason="eviction")], "a halt: eviction"),
    ],
)
def test_anything_else_fails(events, text) -> None:
    outcome = judged(*events)
    assert outcome.outcome is Answer.FAIL
    assert text in str(outcome.evidence["problems"])


def test_a_stall_is_to_be_labelled_and_not_called_slow() -> None:
    plan = PacePlan(fault=PaceFault.DATA, member=1, step=30, seconds=1.0)
    assert judged(said(32.0, "data-stall", 1), plan=plan).outcome is Answer.PASS
    both = judged(said(32.0, "data-stall", 1), said(33.0, "slow", 1), plan=plan)
    assert both.outcome is Answer.FAIL


def test_the_seed_decides_and_the_rank_reads_its_own_plan() -> None:
    kinds = set()
    for seed in range(20):
        plan = choose_pace(SLOW_RANK, seed=seed, seat=2)
        assert plan is not None
        assert plan == choose_pace(SLOW_RANK, seed=seed, seat=2)
        kinds.add(plan.fault)
        environ = pace_plan.to_environ(plan)
        assert pace_plan.from_environ(environ, member=2) == plan
        assert pace_plan.from_environ(environ, member=1) is None
    assert kinds == {PaceFault.STEADY, PaceFault.RAMP, PaceFault.BURSTS}
    assert pace_plan.from_environ({}, member=0) is None
    with pytest.raises(UsageError, match=pace_plan.VARIABLE):
        pace_plan.from_environ({pace_plan.VARIABLE: '{"fault": "tired"}'}, member=0)


@pytest.mark.parametrize("fault", list(CATALOGUE))
def test_they_need_two_others_to_compare_with(fault) -> None:
    assert choose(fault, None, seed=1, nproc=3, steps=100).phase is None
    with pytest.raises(UsageError, match="--nproc 3"):
        choose(fault, None, seed=1, nproc=2, steps=100)


def test_how_much_longer_work_takes_from_step_to_step() -> None:
    def factors(fault: PaceFault, steps: list[int]) -> list[float]:
        plan = PacePlan(fault=fault, member=0, step=10, factor=3.0)
        return [plan.factor_at(step) for step in steps]

    assert factors(PaceFault.STEADY, [9, 10, 99]) == [1.0, 3.0, 3.0]
    assert factors(PaceFault.RAMP, [9, 10, 19, 29, 99]) == pytest.approx([1, 1.1, 2, 3, 3])
    assert factors(PaceFault.BURSTS, [9, 10, 13, 14, 17, 18]) == [1.0, 3.0, 3.0, 1.0, 1.0, 3.0]
    assert factors(PaceFault.DATA, [10]) == [1.0]


def test_a_rank_loses_time_once_and_tells_the_history(tmp_path: Path, monkeypatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("ftkit.session.drag.time.sleep", slept.append)
    with Trace(tmp_path / "events.jsonl", seat=0) as trace:
        plan = PacePlan(fault=PaceFault.DATA, member=0, step=3, seconds=2.5)
        drag = Drag(plan, trace, lambda: 0.0)
        for step in range(1, 6):
            drag.loading(step)
            drag.began(step)
            drag.ended(step)
        assert slept == [2.5]
        assert trace.kinds == {"drill"}
        drag = Drag(PacePlan(fault=PaceFault.STEADY, member=0, step=3, factor=3.0), trace, float)
        for step in (2, 3):
            drag.began(step)
            drag.ended(step)
        assert len(slept) == 2
        assert 0 <= slept[1] < 60
    Drag(None, trace, float).ended(9)


TWO = [said(2.0, "exited", 1), said(3.0, "slow", 2)]


@pytest.mark.parametrize(
    ("verdicts", "answer"),
    [
        (TWO, Answer.PASS),
        ([*TWO, said(4.0, "starved", 0)], Answer.PASS),
        (TWO[:1], Answer.FAIL),
        (TWO[1:], Answer.FAIL),
        ([*TWO, said(4.0, "slow", 0)], Answer.FAIL),
        ([*TWO, said(4.0, "hang-busy", 2)], Answer.FAIL),
    ],
)
def test_of_two_at_once_each_is_called_what_it_is(
    verdicts: list[dict[str, Any]], answer: Answer
) -> None:
    assert judge_two(BEFORE, verdicts, killed=1, slowed=2).outcome is answer


def test_two_at_once_are_two_ranks_in_the_same_steps() -> None:
    drill = choose("two-at-once", None, seed=3, nproc=4, steps=200)
    (kill,) = drill.faults()
    assert drill.pace is not None
    assert (kill.kind, kill.seat, kill.step) == ("kill", drill.seat, drill.pace.step)
    assert drill.pace.member == drill.second_seat != drill.seat
    assert drill.pace.factor >= 2
    with pytest.raises(UsageError, match="--nproc 4"):
        choose("two-at-once", None, seed=3, nproc=3, steps=200)


def test_a_leak_takes_what_is_due_by_the_clock_and_then_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("ftkit.session.drag.time.monotonic", lambda: now[0])
    monkeypatch.setattr("ftkit.session.drag.LEAKED_BYTES_MAX", 3000)
    plan = PacePlan(fault=PaceFault.LEAK, member=1, step=5, bytes_per_s=1000.0)
    with Trace(tmp_path / "events.jsonl") as trace:
        drag = Drag(plan, trace, lambda: 0.0)
        held = []
        for step, at in ((4, 100.0), (5, 101.0), (6, 102.0), (7, 102.5), (8, 200.0)):
            now[0] = at
            drag.began(step)
            drag.ended(step)
            held.append(sum(map(len, drag._leaked)))
    assert held == [0, 0, 1000, 1500, 3000]
