"""What the benchmarks make of events: repairs, steps, joins, ratios; no process is started."""

import random
from itertools import pairwise
from typing import Any

import pytest

from benchmarks import (
    against_torchft,
    drills,
    hang,
    mixed_drills,
    quantized,
    repair,
    respawn,
    step_time,
)
from benchmarks.faults import POINTS, follow, median_step, plan_faults, step_times, steps_for
from benchmarks.series import Series, next_size
from ftkit.core.fault_plan import Kind, Point
from ftkit.launch.checker import Answer, Outcome
from ftkit.launch.drill_plan import choose

Event = dict[str, Any]


def at(mono: float, kind: str, seat: int | None = None, **fields: object) -> Event:
    """An event of the member whose number is its seat's, unless `member` says otherwise."""
    who = {} if seat is None else {"seat": seat, "member": seat}
    return {"t": mono, "mono": mono, "kind": kind, **who, **fields}


def disturbed() -> list[Event]:
    """Three ranks, steps of 0.1 s; seat 1 is killed in step 3, its next member joins for step 5."""
    events = [at(0.0, "spawn", seat) for seat in range(3)]
    for step in (1, 2):
        for seat in range(3):
            events.append(at(1 + step / 10, "attempt", seat, step=step, generation=1))
            events.append(at(1.09 + step / 10, "commit", seat, step=step, generation=1))
    events += [at(1.30, "attempt", seat, step=3, generation=1) for seat in range(3)]
    events += [
        at(1.35, "drill", 1, fault="kill", phase="forward", step=3),
        at(1.36, "exit", 1, code=None, signal=9),
        at(1.37, "verdict", 1, fault="exited"),
        at(1.38, "halt", generation=1),
        # A vote that was passing ends in a commit of the old generation: no repair.
        at(1.385, "commit", 0, step=3, generation=1),
        at(1.40, "attempt", 0, step=3, generation=2),
        at(1.41, "attempt", 2, step=3, generation=2),
        at(1.42, "spawn", 1, member=3),
        at(1.52, "commit", 0, step=3, generation=2),
        at(1.55, "commit", 2, step=3, generation=2),
        at(1.64, "commit", 0, step=4, generation=2),
        at(1.66, "commit", 2, step=4, generation=2),
    ]
    for step in (5, 6):
        for seat, member in ((0, 0), (1, 3), (2, 2)):
            events.append(
                at(1.4 + step / 10, "commit", seat, member=member, step=step, generation=3)
            )
    return events


def test_a_repair_is_told_from_the_slowest_survivor_and_the_newer_generation():
    (found,) = follow(disturbed(), nproc=3)
    assert (found.fault, found.phase, found.seat, found.step) == ("kill", "forward", 1, 3)
    assert (found.survivors, found.whole) == (2, True)
    assert found.detect_s == pytest.approx(0.02)
    assert found.replay_s == pytest.approx(0.06)
    assert found.repair_s == pytest.approx(0.20)
    assert found.back_s == pytest.approx(0.55)


def test_a_survivor_that_never_commits_again_means_no_repair():
    silent = [
        e for e in disturbed() if not (e["kind"] == "commit" and e["seat"] == 2 and e["mono"] > 1.5)
    ]
    (found,) = follow(silent, nproc=3)
    assert found.repair_s is None
    assert found.replay_s is not None


def test_a_fault_that_strikes_before_the_world_healed_is_told_apart():
    events = [e for e in disturbed() if e["mono"] < 1.6]
    events.append(at(1.6, "drill", 2, fault="kill", phase="data", step=4))
    first, second = follow(events, nproc=3)
    assert first.whole
    assert not second.whole
    assert second.survivors == 1  # seat 1 is gone, seat 2 is the victim


def test_steps_are_timed_inside_generations_of_the_size_asked_for():
    # Two intervals of seat 0's first member, the last cut short by the fault, then one a member.
    expected = [0.095, *[0.1] * 6]
    assert sorted(step_times(disturbed(), size=3)) == pytest.approx(expected)
    assert median_step(disturbed(), size=2) == pytest.approx(0.115)
    with pytest.raises(ValueError, match="no world of 4 members"):
        median_step(disturbed(), size=4)


def test_faults_are_planned_from_the_seed_one_a_seat_and_far_apart():
    plans = [
        plan_faults(random.Random(7), [Kind.KILL], nproc=3, count=3, gap=100) for _ in range(2)
    ]
    assert plans[0] == plans[1]
    assert {f.seat for f in plans[0]} == {0, 1, 2}
    assert all(f.member == f.seat and f.kind is Kind.KILL for f in plans[0])
    steps = [f.step for f in plans[0]]
    assert all(90 < later - sooner < 110 for sooner, later in pairwise(steps))
    assert max(steps) + 90 < steps_for(3, 100)
    assert Point.RECOVERY not in POINTS


@pytest.mark.parametrize(
    ("tried", "expected"),
    [
        ({4: 0.1}, 2),
        ({4: 0.1, 2: 0.07}, 1),  # 10 ms a slot of fixed cost, 15 ms a sample
        ({2: 0.03, 4: 0.04}, 6),
        ({2: 0.05, 1: 0.06}, 2),  # noise: stays at the nearer one
    ],
)
def test_the_slot_size_is_found_along_a_line(tried, expected):
    assert next_size(tried, 0.05) == expected


def series(**changed: Any) -> Series:
    found: dict[str, Any] = {
        "nproc": 3,
        "slot_size": 2,
        "step_s": 0.05,
        "repairs": follow(disturbed(), nproc=3),
        "not_counted": [],
        "params": "aa11",
        "problems": [],
    }
    return Series(**(found | changed))


def test_repair_and_hang_judge_percentiles_and_pass_problems_on():
    told = {f.name: f for f in repair.report([series()], {}).figures}
    assert told["3 ranks: repair_s p50"].value == pytest.approx(0.2)
    assert told["3 ranks: repair_s p50"].holds
    assert told["3 ranks: replay_s p50"].holds
    assert told["3 ranks: median step"].value == 0.05
    bad = series(problems=["the bits differ"])
    assert repair.report([bad], {}).problems == ["the bits differ"]
    found = hang.report({("stop", 3): bad}, {})
    assert found.problems == ["stop: the bits differ"]
    assert {f.name: f.goal for f in found.figures}["stop, 3 ranks: repair_s p95"] == "<= 3"


def side(step_s: float, *, loss: float = 2.0, params: str = "aa") -> step_time.Side:
    return step_time.Side(step_s=step_s, blocked_s=0.001, loss=loss, params=params)


def test_step_times_are_compared_round_by_round_and_void_when_the_result_differs():
    rounds = [
        step_time.Round(model="4m", nproc=2, ftkit=side(a), plain=side(b, params="bb"))
        for a, b in ((0.10, 0.10), (0.30, 0.20), (0.11, 0.10))
    ]
    found = step_time.report(rounds, {})
    assert found.figures[0].value == pytest.approx(1.1)
    assert found.figures[0].holds is False
    assert "1.000..1.500" in found.figures[0].against
    assert not found.problems
    wrong = step_time.Round(
        model="4m", nproc=2, ftkit=side(0.01, loss=2.1, params="cc"), plain=side(0.1)
    )
    problems = step_time.report([*rounds, wrong], {}).problems
    assert len(problems) == 2  # two sets of parameters, and a loss that is another one


def test_intervals_leave_the_first_steps_out():
    assert step_time.median_interval([[0, 9, 10, 11], [0, 9, 10, 13]], 1) == 1.0


def test_a_respawn_is_timed_from_spawn_to_first_commit_without_the_repaired_step():
    (found,) = respawn.respawns_of(disturbed(), nproc=3)
    assert found.seat == 1
    assert found.joined_s == pytest.approx(0.48)
    # Of the steps that ended meanwhile, the ones the kill fell into are no part of the join.
    assert found.longest_s == pytest.approx(0.26)
    assert found.median_s == pytest.approx(0.1)
    report = respawn.report([found], [0.4], {"aa"}, {})
    assert report.figures[0].value == pytest.approx(1.2)
    assert not report.problems
    assert respawn.report([found], [0.4], {"aa", "bb"}, {}).problems
    assert respawn.report([], [], {"aa"}, {}).figures[0].value is None


def outcome(answer: Answer, **changed: Any) -> Outcome:
    found: dict[str, Any] = {
        "outcome": answer,
        "fault": "kill",
        "phase": "vote",
        "seed": 5,
        "detect_s": 0.1,
        "repair_s": 0.2,
        "steps_lost": 0,
        "samples_lost": 0,
        "samples_doubled": 0,
        "survivor_exits": 0,
        "params_equal": True,
        "verdict": None,
        "evidence": {"problems": [], "missing": []},
    }
    return Outcome(**(found | changed))


def test_drills_are_counted_and_a_failing_one_says_how_to_do_it_again():
    drill = choose("all", None, seed=5, nproc=3, steps=60)
    bad = outcome(
        Answer.FAIL, samples_lost=12, params_equal=False, evidence={"problems": ["step 9 is gone"]}
    )
    options: dict[str, object] = {"nproc": 3, "steps": 60, "max_stall": 5.0}
    found = drills.report(
        [
            drills.Judged(drill=drill, outcome=outcome(Answer.PASS)),
            drills.Judged(drill=drill, outcome=bad),
        ],
        "aa11",
        options,
    )
    told = {f.name: f.value for f in found.figures}
    assert told["drills"] == 2
    assert told["passed"] == told["failed"] == 1
    assert told["samples lost"] == 12
    assert told["without equal parameters"] == 1
    against = {f.name: f.against for f in found.figures}
    assert against["passed"] == against["failed"] == "50.0% of 2, 95 % in [9.5%, 90.5%]"
    assert against["samples lost"] == ""
    (note,) = found.notes
    assert "ftkit drill run all --seed 5 --nproc 3 --steps 60 --max-stall 5 " in note
    assert "step 9 is gone" in note


def test_a_series_that_all_survived_says_how_little_that_rules_out():
    passed = drills.interval(200, 200)
    assert passed == "100.0% of 200, 95 % in [98.1%, 100.0%]"
    assert drills.interval(0, 0) == ""


def test_mixed_drills_are_counted_together_and_by_series():
    drill = choose("mixed", None, seed=5, nproc=4, steps=60)
    good = drills.Judged(drill=drill, outcome=outcome(Answer.PASS))
    bad = drills.Judged(drill=drill, outcome=outcome(Answer.UNKNOWN))
    options: dict[str, object] = {"nproc": 4, "steps": 60, "max_stall": 5.0}
    found = mixed_drills.report({"DDP": [good] * 3, "FSDP2": [bad]}, {"DDP": "aa"}, options)
    told = {f.name: f for f in found.figures}
    assert (told["passed of all"].value, told["passed of all"].holds) == (3, False)
    assert told["passed of all"].against == drills.interval(3, 4)
    assert (told["DDP: passed"].value, told["FSDP2: passed"].value) == (3, 0)
    (note,) = found.notes
    assert note.startswith("FSDP2: unknown: ftkit drill run mixed --seed 5 ")
    assert "--sharded" in note


def test_torchft_is_repaired_when_each_survivor_committed_the_victims_step_or_a_later_one():
    kill = {"kind": "kill", "mono": 10.0, "step": 7}
    late = {"kind": "commit", "mono": 10.1, "step": 6}  # was under way already
    near, far = ({"kind": "commit", "mono": m, "step": 7} for m in (15.0, 15.2))
    assert against_torchft.repair_after(kill, [[late, near], [far]]) == pytest.approx(5.2)
    assert against_torchft.repair_after(kill, [[late, near], [late]]) is None


def run(framework: str, repair_s: float | None, step_s: float, *params: str) -> against_torchft.Run:
    return against_torchft.Run(
        framework=framework, repair_s=repair_s, step_s=step_s, survivors_lost=0, params=params
    )


def test_both_sides_are_compared_and_what_was_patched_is_said():
    runs = [
        run("torchft", 5.0, 0.04, "tt", "tt"),
        run("ftkit", 0.2, 0.03, "aa"),
        run("plain DDP", None, 0.02, "pp"),
    ]
    found = against_torchft.report(runs, {"aa"}, "", {})
    told = {f.name: f for f in found.figures}
    assert told["ftkit / torchft"].value == pytest.approx(0.04)
    assert told["torchft: step / plain DDP"].value == pytest.approx(2.0)
    assert told["torchft: step / plain DDP"].against == "+20.0 ms a step"
    assert against_torchft.PATCH in found.notes
    assert not found.problems
    assert against_torchft.report(runs, {"other"}, "", {}).problems


def test_without_torchft_the_reason_stands_in_the_report():
    found = against_torchft.report([run("ftkit", 0.2, 0.03, "aa")], {"aa"}, "pip said no", {})
    assert found.notes == ["no figures for torchft: pip said no"]
    assert {f.name: f.value for f in found.figures}["ftkit / torchft"] is None


def quantized_rank(**digests: int) -> dict[str, Any]:
    forms = {"fp32": 0.4, "bf16": 0.2, "int8": 0.1, "fp8": 0.2}
    return {
        "times": {form: [s, s, 9.0] for form, s in forms.items()},
        "errors": dict.fromkeys(forms, 0.005),
        "digests": {form: digests.get(form, 7) for form in forms},
    }


def test_quantized_forms_are_judged_by_their_ratio_and_only_on_limited_links():
    measured = {(quantized.CASES[0], 2): [quantized_rank(), quantized_rank()]}
    told = {f.name: f for f in quantized.report(measured, {}, limited=True).figures}
    int8 = told["200mbit 4 MiB, 2 ranks: int8 / fp32"]
    assert (int8.value, int8.holds) == (0.25, True)
    assert told["200mbit 4 MiB, 2 ranks: int8 error"].holds
    assert told["200mbit 4 MiB, 2 ranks: bf16 / fp32"].holds is None
    unjudged = quantized.report(measured, {}, limited=False)
    assert all(f.holds is None for f in unjudged.figures if f.name.endswith("/ fp32"))
    assert "no goal applies" in unjudged.notes[-1]


def test_quantized_ranks_that_differ_in_a_bit_void_the_figures():
    measured = {(quantized.CASES[0], 2): [quantized_rank(), quantized_rank(int8=8)]}
    (problem,) = quantized.report(measured, {}, limited=True).problems
    assert "differ in the bits of int8" in problem
