"""The checker against literal histories: the good one, and every way to spoil it by name."""

import json
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftkit.launch.checker import Answer, Expectation, Outcome, check
from tests.launch.histories import (
    FULL,
    HEALED,
    TWO,
    Event,
    attempt,
    commits,
    disturbed,
    event,
    undisturbed,
    votes,
)

KILL = Expectation(
    fault="kill", phase="backward", seed=7, world_size=3, steps=6, slots=8, slot_size=4
)


def judge(events: list[Event], reference: list[Event] | None = None) -> Outcome:
    return check(events, undisturbed() if reference is None else reference, KILL)


def without(events: list[Event], **match: object) -> list[Event]:
    left = [e for e in events if any(e.get(k) != v for k, v in match.items())]
    assert len(left) < len(events), f"nothing matches {match}"
    return left


def changed(events: list[Event], new: dict[str, object], **match: object) -> list[Event]:
    assert any(all(e.get(k) == v for k, v in match.items()) for e in events)
    return [e | new if all(e.get(k) == v for k, v in match.items()) else e for e in events]


def words(outcome: Outcome, key: str = "problems") -> str:
    return "\n".join(outcome.evidence[key])  # type: ignore[arg-type]


# ---- what must pass


def test_a_repaired_kill_passes_with_its_figures() -> None:
    outcome = judge(disturbed())
    assert outcome.to_json() | {"evidence": {}} == {
        "outcome": "pass",
        "fault": "kill",
        "phase": "backward",
        "seed": 7,
        "detect_s": pytest.approx(0.024),
        "repair_s": pytest.approx(0.180),
        "steps_lost": 0,
        "steps_replayed": 0,
        "samples_lost": 0,
        "samples_doubled": 0,
        "survivor_exits": 0,
        "params_equal": True,
        "verdict": {"class": "exited", "culprit": 1, "reason": "killed by SIGKILL"},
        "evidence": {},
    }
    incidents = outcome.evidence["incidents"]
    assert isinstance(incidents, list)
    assert incidents[0]["back_at_step"] == 5
    json.dumps(outcome.to_json())


@given(st.randoms(use_true_random=False))
def test_the_order_of_the_files_does_not_matter(shuffle: random.Random) -> None:
    # Within one process the order is that of its file; mono ties between processes are free.
    by_member: dict[object, list[Event]] = {}
    for e in disturbed():
        by_member.setdefault(e.get("member"), []).append(e)
    files = list(by_member.values())
    shuffle.shuffle(files)
    assert judge([e for file in files for e in file]) == judge(disturbed())


def test_a_commit_that_only_the_dead_rank_saw_is_no_loss() -> None:
    # All voted on step 3 in generation 1, the victim saw it pass and was killed at once.
    events = disturbed() + votes(10.3, 3, 1, FULL) + commits(10.311, 3, 1, {1: 1})
    assert judge(events).outcome is Answer.PASS


def rolled_forward() -> list[Event]:
    """All voted; seat 0 saw it pass, seat 2 did not and rolls forward in generation 2."""
    events = without(without(disturbed(), kind="vote", step=3), kind="commit", step=3)
    events = without(events, kind="rollback")
    events += votes(10.3, 3, 1, FULL) + commits(10.311, 3, 1, {0: 0})
    events = changed(events, {"step": 3}, kind="resume", generation=2)
    return [*events, event(10.36, "forward", seat=2, member=2, step=3, generation=2)]


def test_rolling_forward_applies_the_attempt_that_was_voted() -> None:
    assert judge(rolled_forward()).outcome is Answer.PASS


def test_rolling_forward_may_be_told_as_a_commit_too() -> None:
    told_twice = rolled_forward() + commits(10.361, 3, 2, {2: 2})
    assert judge(told_twice) == judge(rolled_forward())


def test_a_coordinator_may_die_unnoticed() -> None:
    plan = Expectation(
        fault="kill-coordinator", phase="forward", seed=1, world_size=3, steps=6, slots=8,
        slot_size=4, evicts=False,
    )  # fmt: skip
    drill = event(10.25, "drill", fault="kill-coordinator", phase="forward", seat=None, member=None)
    outcome = check([*undisturbed(), drill], undisturbed(), plan)
    assert outcome.outcome is Answer.PASS
    assert outcome.repair_s == pytest.approx(0.055)
    assert outcome.detect_s is None


def test_a_fault_that_struck_too_seldom_tells_nothing() -> None:
    plan = Expectation(
        fault="flap", phase="any", seed=1, world_size=3, steps=6, slots=8, slot_size=4, strikes=2
    )
    outcome = check(disturbed(), undisturbed(), plan)
    assert outcome.outcome is Answer.UNKNOWN
    assert outcome.evidence["missing"] == ["the fault struck 1 times of 2: give more --steps"]


def test_a_second_fault_in_the_recovery_is_followed_too() -> None:
    # Seat 2 is killed while the world regroups: seat 0 alone plays step 3 in generation 3.
    events = undisturbed()[:6] + attempt(10.1, 1, 1, FULL) + attempt(10.2, 2, 1, FULL)
    for at, seat in ((10.31, 1), (10.34, 2)):
        events += [
            event(at, "drill", fault="kill", phase="backward", seat=seat, member=seat),
            event(at + 0.01, "verdict", fault="exited", member=seat, seat=seat, reason="gone"),
        ]
    events += attempt(10.5, 3, 3, {0: 0}) + attempt(10.6, 4, 3, {0: 0})
    healed = {0: 0, 1: 4, 2: 3}
    events += attempt(10.8, 5, 4, healed) + attempt(10.9, 6, 4, healed)
    events += [event(11, "final", seat=s, member=m, params="aa11") for s, m in healed.items()]
    events += [event(11.2, "end", outcome="completed", reason="")]
    outcome = judge(events)
    assert outcome.outcome is Answer.PASS, outcome.evidence
    assert outcome.repair_s == pytest.approx(10.505 - 10.31)  # the slower of the two
    assert outcome.detect_s == pytest.approx(0.01)


# ---- what must fail


def one_slot_forgotten(events: list[Event]) -> list[Event]:
    return changed(events, {"slots": [4, 5, 6]}, kind="vote", step=3, seat=2)


def one_slot_twice(events: list[Event]) -> list[Event]:
    return changed(events, {"slots": [3, 4, 5, 6, 7]}, kind="vote", step=3, seat=2)


def a_slot_that_does_not_exist(events: list[Event]) -> list[Event]:
    return changed(events, {"slots": [4, 5, 6, 7, 8]}, kind="vote", step=3, seat=2)


def a_whole_step_skipped(events: list[Event]) -> list[Event]:
    return without(without(events, kind="vote", step=4), kind="commit", step=4)


def applied_twice(events: list[Event]) -> list[Event]:
    return events + commits(10.62, 4, 2, {2: 2})


def replayed_after_a_commit(events: list[Event]) -> list[Event]:
    # Survivors had committed step 3 in generation 1 and play it again without a rollback.
    survivors_saw_it = votes(10.3, 3, 1, FULL) + commits(10.311, 3, 1, TWO)
    return without(events, kind="rollback") + survivors_saw_it


def other_samples(events: list[Event]) -> list[Event]:
    return changed(events, {"data": "other"}, kind="vote", step=5, seat=0)


@pytest.mark.parametrize(
    ("spoil", "lost", "doubled", "says"),
    [
        (one_slot_forgotten, 4, 0, "slots missing [7]"),
        (one_slot_twice, 0, 4, "too many [3]"),
        (a_slot_that_does_not_exist, 0, 4, "too many [8]"),
        (a_whole_step_skipped, 32, 0, "step 4 was never committed"),
        (applied_twice, 0, 32, "applied step 4 again"),
        (other_samples, 12, 0, "other samples than undisturbed"),
    ],
)
def test_samples_that_are_lost_or_doubled_are_counted(
    spoil: Callable[[list[Event]], list[Event]], lost: int, doubled: int, says: str
) -> None:
    outcome = judge(spoil(disturbed()))
    assert outcome.outcome is Answer.FAIL
    assert (outcome.samples_lost, outcome.samples_doubled) == (lost, doubled)
    assert says in words(outcome)


def test_two_survivors_that_replay_a_step_they_had_committed_doubled_it() -> None:
    outcome = judge(replayed_after_a_commit(disturbed()))
    assert outcome.outcome is Answer.FAIL
    # The world's resume says it stands at step 2: both were taken back, so the step is lost.
    assert (outcome.steps_lost, outcome.samples_doubled) == (1, 0)

    forgot = without(replayed_after_a_commit(disturbed()), kind="resume", generation=2)
    outcome = judge(forgot)
    assert outcome.outcome is Answer.FAIL
    assert (outcome.steps_lost, outcome.samples_doubled) == (0, 2 * 32)


def test_a_restart_from_further_back_loses_the_steps_in_between() -> None:
    # Everyone dies after step 6 and three new members start again from step 4.
    new = {0: 4, 1: 5, 2: 6}
    events = without(without(disturbed(), kind="final"), kind="end")
    events += attempt(12.0, 5, 4, new) + attempt(12.1, 6, 4, new)
    outcome = judge(events)
    assert outcome.outcome is Answer.FAIL
    assert outcome.steps_lost == 2
    assert "steps [5, 6] were committed and then undone" in words(outcome)


def test_a_job_of_shards_may_play_steps_again_that_it_had_committed() -> None:
    back = [event(10.350, "resume", generation=2, step=1, members=[0, 2])]
    events = without(disturbed(), kind="resume", generation=2) + back + attempt(10.4, 2, 2, TWO)
    whole, shards = judge(events), check(events, undisturbed(), replace(KILL, steps_back=3))
    assert (whole.outcome, whole.steps_lost) == (Answer.FAIL, 1)
    assert (shards.outcome, shards.steps_lost, shards.steps_replayed) == (Answer.PASS, 0, 1)
    assert shards.samples_doubled == 0


def test_a_job_of_shards_may_not_go_back_far() -> None:
    back = [event(10.350, "resume", generation=2, step=0, members=[0, 2])]
    events = without(disturbed(), kind="resume", generation=2) + back
    events += attempt(10.4, 1, 2, TWO) + attempt(10.45, 2, 2, TWO)
    assert check(events, undisturbed(), replace(KILL, steps_back=3)).outcome is Answer.PASS
    outcome = check(events, undisturbed(), replace(KILL, steps_back=1))
    assert outcome.outcome is Answer.FAIL
    assert "from step 2 to 1, by more than 1 steps" in words(outcome)


def test_a_survivor_that_leaves_is_counted_and_the_target_is_not() -> None:
    left = event(10.9, "exit", seat=2, member=2, code=1, signal=None)
    outcome = judge([*disturbed(), left])
    assert outcome.outcome is Answer.FAIL
    assert outcome.survivor_exits == 1
    assert "member 2 (seat 2), not a target, left with code 1" in words(outcome)


def test_leaving_after_the_end_is_no_survivor_exit() -> None:
    late = event(11.3, "exit", seat=2, member=2, code=None, signal=15)
    assert judge([*disturbed(), late]).survivor_exits == 0


def test_an_accused_innocent_fails_the_drill() -> None:
    accusation = event(10.4, "verdict", fault="stopped", member=0, seat=0, reason="slow")
    outcome = judge([*disturbed(), accusation])
    assert outcome.outcome is Answer.FAIL
    assert "not a target, was judged stopped: slow" in words(outcome)


def test_parameters_that_differ_from_the_undisturbed_run_fail() -> None:
    outcome = judge(changed(disturbed(), {"params": "bb22"}, kind="final"))
    assert (outcome.outcome, outcome.params_equal) == (Answer.FAIL, False)


def test_ranks_that_differ_from_each_other_fail_even_without_a_reference() -> None:
    events = changed(disturbed(), {"params": "bb22"}, kind="final", seat=1)
    outcome = check(events, None, KILL)
    assert (outcome.outcome, outcome.params_equal) == (Answer.FAIL, False)


def test_a_seat_that_was_back_for_the_last_step_only_finishes_with_it() -> None:
    outcome = judge(without(disturbed(), kind="commit", member=3))
    assert outcome.outcome is Answer.PASS
    assert outcome.evidence["incidents"][0]["back_at_step"] == KILL.steps  # type: ignore[index]


def test_a_seat_that_stays_away_fails() -> None:
    events = without(disturbed(), kind="commit", member=3)
    outcome = judge(without(events, kind="final", member=3))
    assert outcome.outcome is Answer.FAIL
    assert "the seat of member 1 committed no step after it was lost" in words(outcome)


def test_a_survivor_that_never_commits_again_fails() -> None:
    events = [
        e for e in disturbed()
        if not (e["kind"] == "commit" and e["member"] == 2 and e["mono"] > 10.4)
    ]  # fmt: skip
    outcome = judge(events)
    assert (outcome.outcome, outcome.repair_s) == (Answer.FAIL, None)
    assert "member 2 committed nothing after it in a generation above 1" in words(outcome)


def test_a_fault_after_the_last_step_is_not_judged() -> None:
    last = max(e["mono"] for e in undisturbed() if e["kind"] == "commit")
    drill = event(last + 0.001, "drill", fault="disk-full", phase="byte 7", seat=None)
    plan = replace(KILL, fault="disk-full", evicts=False)
    outcome = check([*undisturbed(), drill], undisturbed(), plan)
    assert outcome.outcome is Answer.UNKNOWN
    assert "member 2 had committed its last step before it" in str(outcome.evidence["missing"])


def test_a_commit_of_the_old_generation_is_no_repair() -> None:
    # The vote was already passing: survivors commit step 3 in generation 1 just after the kill.
    events = without(without(disturbed(), kind="vote", step=3), kind="commit", step=3)
    events = without(events, kind="rollback")
    events += votes(10.3, 3, 1, FULL) + commits(10.313, 3, 1, TWO)
    events = changed(events, {"step": 3}, kind="resume", generation=2)
    outcome = judge(events)
    assert outcome.outcome is Answer.PASS
    assert outcome.repair_s == pytest.approx(10.605 - 10.312)  # step 4, in generation 2


def test_a_job_that_stops_early_fails() -> None:
    outcome = judge(changed(disturbed(), {"outcome": "failed"}, kind="end"))
    assert outcome.outcome is Answer.FAIL
    assert "the job ended as 'failed'" in words(outcome)
    short = [e for e in disturbed() if e.get("step") != 6]
    assert "the last committed step is 5, the job has 6" in words(judge(short))


# ---- what is not known


@pytest.mark.parametrize(
    ("match", "says"),
    [
        ({"kind": "end"}, "the history breaks off"),
        ({"kind": "final", "seat": 2}, "seats [2] told no final parameters"),
        ({"kind": "final"}, "seats [0, 1, 2] told no final parameters"),
    ],
)
def test_what_is_missing_is_unknown_and_never_a_pass(match: dict[str, object], says: str) -> None:
    outcome = judge(without(disturbed(), **match))
    assert outcome.outcome is Answer.UNKNOWN
    assert says in words(outcome, "missing")


def test_a_drill_whose_fault_never_struck_is_unknown() -> None:
    outcome = judge(undisturbed())
    assert outcome.outcome is Answer.UNKNOWN
    assert "the fault was not injected" in words(outcome, "missing")


def test_a_death_that_no_drill_aimed_at_fails() -> None:
    outcome = judge(without(disturbed(), kind="drill"))
    assert (outcome.outcome, outcome.survivor_exits) == (Answer.FAIL, 1)


def test_without_an_undisturbed_run_equality_is_unknown() -> None:
    outcome = check(disturbed(), None, KILL)
    assert (outcome.outcome, outcome.params_equal) == (Answer.UNKNOWN, None)


def test_an_undisturbed_run_that_disagrees_with_itself_proves_nothing() -> None:
    reference = changed(undisturbed(), {"params": "cc"}, kind="final", seat=0)
    outcome = judge(disturbed(), reference)
    assert (outcome.outcome, outcome.params_equal) == (Answer.UNKNOWN, None)


def test_unseen_faults_are_unknown() -> None:
    events = without(without(disturbed(), kind="verdict"), kind="halt")
    outcome = judge(events)
    assert (outcome.outcome, outcome.detect_s) == (Answer.UNKNOWN, None)


def test_a_commit_without_a_vote_is_unknown() -> None:
    outcome = judge(without(disturbed(), kind="vote", step=5, seat=0))
    assert outcome.outcome is Answer.FAIL  # its slots are missing from the attempt, too
    assert "no vote" in words(outcome, "missing")


def test_a_malformed_event_is_unknown() -> None:
    outcome = judge([*disturbed(), event(10.9, "exit", seat=0)])
    assert outcome.outcome is Answer.UNKNOWN
    assert "exit without" in words(outcome, "missing")


def test_nothing_at_all_is_unknown() -> None:
    outcome = judge([])
    assert outcome.outcome is Answer.UNKNOWN
    assert (outcome.detect_s, outcome.repair_s, outcome.params_equal) == (None, None, None)


def test_a_history_cut_anywhere_is_never_a_pass() -> None:
    events = sorted(disturbed(), key=lambda e: float(e["mono"]))
    for kept in range(len(events)):
        assert judge(events[:kept]).outcome is Answer.UNKNOWN, kept
    assert judge(events).outcome is Answer.PASS


def all_lost() -> list[Event]:
    """All three ranks die in step 4, and the job goes on from step 2, which parity had."""
    back = {0: 3, 1: 4, 2: 5}
    events = [e for e in disturbed() if e["mono"] < 10.3]
    events.append(event(10.25, "parity", node=0, step=2, seconds=0.1))
    events += attempt(10.4, 3, 1, FULL)
    events += [
        event(10.5, "drill", fault="corrupt-shard", phase="any", seat=s, member=m, step=3)
        for s, m in FULL.items()
    ]
    events += [event(10.51, "exit", seat=s, member=m, code=None, signal=9) for s, m in FULL.items()]
    events.append(event(10.52, "halt", generation=1, reason="all are gone"))
    events.append(
        event(10.6, "rebuild", node=1, step=2, damaged=["shard 1: does not match its digest"])
    )
    events.append(event(10.7, "resume", generation=2, step=2, members=[0, 1, 2]))
    for step in range(3, 7):
        events += attempt(10.7 + step / 10, step, 2, back)
    for seat, member in back.items():
        events.append(event(12, "final", seat=seat, member=member, params="aa11", loss=3.5))
        events.append(event(12.1, "exit", seat=seat, member=member, code=0, signal=None))
    return [*events, event(12.2, "end", outcome="completed", reason="6 steps")]


CORRUPT = replace(KILL, fault="corrupt-shard", loses_all=True, corrupts=True)


def test_all_ranks_lost_may_cost_the_steps_that_parity_had_not() -> None:
    outcome = check(all_lost(), undisturbed(), CORRUPT)
    assert outcome.outcome is Answer.PASS, outcome.evidence
    assert outcome.steps_lost == 1
    assert outcome.evidence["published"] == 2
    assert outcome.repair_s == pytest.approx(0.505)


def test_a_step_that_parity_had_may_not_be_lost() -> None:
    events = [e | {"step": 3} if e["kind"] == "parity" else e for e in all_lost()]
    outcome = check(events, undisturbed(), CORRUPT)
    assert outcome.outcome is Answer.FAIL
    assert "steps [3] were committed and then undone" in words(outcome)


def test_flipped_bits_that_nobody_noticed_fail() -> None:
    events = [e | {"damaged": []} if e["kind"] == "rebuild" else e for e in all_lost()]
    outcome = check(events, undisturbed(), CORRUPT)
    assert outcome.outcome is Answer.FAIL
    assert "anybody noticed" in words(outcome)


def test_losses_are_compared_with_the_undisturbed_run() -> None:
    assert judge(disturbed()).evidence["first_loss_difference"] is None
    off = changed(disturbed(), {"loss": 9.0}, kind="commit", step=5, seat=0)
    assert judge(off).evidence["first_loss_difference"] == 5


def test_the_expectation_is_checked() -> None:
    with pytest.raises(ValueError, match="slots must be at least 1, got 0"):
        Expectation(fault="kill", phase="x", seed=0, world_size=3, steps=6, slots=0, slot_size=4)


def test_the_literal_histories_are_what_they_claim() -> None:
    assert {e["member"] for e in disturbed() if e["kind"] == "final"} == set(HEALED.values())
