"""What came of a strike, from written-out histories."""

from dataclasses import replace

import pytest

from ftkit.core.ids import Generation, MemberId
from ftkit.launch.programme.measure import (
    Measured,
    WorldWatch,
    measure,
    on_one_clock,
    outcome_of,
    seen_enough,
)
from ftkit.launch.programme.record import Survival
from tests.launch.histories import TWO, Event, attempt, commits, disturbed, event, votes
from tests.launch.programme.jobs import target

AIM = replace(target(), generation=Generation(1))
STRUCK_AT = 10.312


def living(*more: Event) -> list[Event]:
    """The disturbed run as it is while it still goes on."""
    return [*(e for e in disturbed() if e["kind"] not in ("final", "end", "exit")
              or e.get("signal")), *more]  # fmt: skip


def outcome(found: Measured, waited_s: float = 5) -> tuple[Survival, str] | None:
    return outcome_of(found, waited_s=waited_s, limit_s=60)


def test_a_kill_that_was_survived() -> None:
    found = measure(living(), AIM, 3)
    assert found.step == 2
    assert found.step_s == pytest.approx(0.1)
    assert found.detect_s == pytest.approx(0.024)
    assert found.next_step_s == pytest.approx(0.18)
    # Step 5 is the first of all three, in generation 3.
    (whole,) = {e["mono"] for e in disturbed() if e["kind"] == "commit" and e["step"] == 5}
    assert found.whole_s == pytest.approx(whole - STRUCK_AT)
    assert found.lost_s == pytest.approx(whole - STRUCK_AT - 3 * 0.1)
    assert (found.steps_replayed, found.steps_lost, found.others) == (0, 0, ())
    assert (found.slots_lost, found.slots_doubled) == (0, 0)
    assert outcome(found) == (Survival.SURVIVED, "")


def test_it_is_whole_when_as_many_as_before_have_committed_a_new_step() -> None:
    watch, until = WorldWatch(AIM, 3), None
    for e in sorted(living(), key=lambda e: e["mono"]):
        watch.feed([e])
        if watch.whole and until is None:
            until = e["step"]
    assert until == 5
    assert not watch.ended
    watch.feed([event(20.0, "end", outcome="completed")])
    assert watch.ended


def test_a_world_that_stays_small_is_waited_for_and_then_it_has_failed() -> None:
    short = [e for e in living() if e["mono"] < 10.62]
    found = measure(short, AIM, 3)
    assert found.next_step_s == pytest.approx(0.18)
    assert (found.whole_s, found.lost_s) == (None, None)
    assert outcome(found) is None
    assert outcome(found, 61) == (
        Survival.FAILED, "the world was not whole again after 61 s"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("end", "answer"),
    [
        (
            {"outcome": "failed", "code": 137, "reason": "oh"},
            (Survival.FAILED, "the job ended: oh"),
        ),
        ({"outcome": "failed", "code": 130, "reason": "x"}, (Survival.UNKNOWN, "by hand")),
        ({"outcome": "completed", "code": 0}, (Survival.UNKNOWN, "its last step")),
    ],
)
def test_a_job_that_ends_meanwhile(end, answer) -> None:
    short = [e for e in living() if e["mono"] < 10.62]
    told = outcome(measure([*short, event(10.63, "end", **end)], AIM, 3))
    assert told is not None
    assert told[0] is answer[0]
    assert answer[1] in told[1]


def test_somebody_else_who_goes_is_a_failure() -> None:
    gone = event(10.66, "exit", seat=2, member=2, code=None, signal=11)
    found = measure(living(gone), AIM, 3)
    assert outcome(found) == (Survival.FAILED, "rank 2, which was not struck, left with signal 11")
    judged = event(10.66, "verdict", seat=0, member=0, fault="stopped", reason="so")
    told = outcome(measure(living(judged), AIM, 3))
    assert told == (Survival.FAILED, "rank 0, which was not struck, was judged stopped: so")
    slow = event(10.66, "verdict", seat=0, member=0, fault="slow", reason="so")
    assert outcome(measure(living(slow), AIM, 3)) == (Survival.SURVIVED, "")
    beside = replace(AIM, beside=(MemberId(2),))
    assert outcome(measure(living(gone), beside, 3)) == (Survival.SURVIVED, "")
    earlier = event(10.2, "exit", seat=4, member=9, code=1, signal=None)
    assert outcome(measure(living(earlier), AIM, 3)) == (Survival.SURVIVED, "")


def test_samples_that_are_lost_or_counted_twice_are_a_failure() -> None:
    events = living()
    (vote,) = [e for e in events if e["kind"] == "vote" and e["step"] == 4 and e["seat"] == 2]
    vote["slots"] = [3, 5, 6]
    found = measure(events, AIM, 3)
    assert (found.slots_lost, found.slots_doubled) == (2, 1)
    assert outcome(found) == (
        Survival.FAILED, "2 slots of the global batch were lost, 1 counted twice"
    )  # fmt: skip


def test_where_no_slots_are_told_nothing_is_claimed_of_them() -> None:
    found = measure([e for e in living() if e["kind"] != "vote"], AIM, 3)
    assert (found.slots_lost, found.slots_doubled) == (None, None)
    assert outcome(found) == (Survival.SURVIVED, "")


def test_votes_from_before_the_first_event_are_not_missed() -> None:
    events = [
        e for e in living() if not (e["kind"] == "vote" and e["seat"] == 2 and e["step"] == 1)
    ]
    found = measure(events, AIM, 3)
    assert (found.slots_lost, found.slots_doubled) == (0, 0)


def test_a_commit_of_the_old_world_shows_nothing() -> None:
    late = commits(10.32, 3, 1, {0: 0})
    assert measure(living(*late), AIM, 3).next_step_s == pytest.approx(0.18)


def test_who_leaves_with_notice_holds_nobody_up() -> None:
    notice = replace(AIM, fault="preempt")
    on = attempt(10.32, 3, 1, TWO)
    found = measure(living(*on), notice, 3)
    assert found.next_step_s == pytest.approx(10.325 - STRUCK_AT)


def test_steps_that_are_played_again_are_counted() -> None:
    back = [*commits(10.45, 1, 2, TWO), *commits(10.46, 2, 2, TWO)]
    found = measure(living(*back), AIM, 3)
    assert (found.steps_replayed, found.steps_lost) == (2, 0)
    short = [e for e in living(*back) if e["mono"] < 10.455]
    assert measure(short, AIM, 3).steps_lost == 1


def test_a_strike_that_no_event_tells_of_is_not_known() -> None:
    silent = [e for e in living() if e["kind"] != "drill"]
    assert outcome(measure(silent, AIM, 3)) is None
    told = outcome(measure(silent, AIM, 3), 61)
    assert told is not None
    assert told[0] is Survival.UNKNOWN
    assert "no event tells" in told[1]


def test_between_hosts_the_wall_clock_counts() -> None:
    events = [{**e, "mono": e["mono"] + 5000.0 * (e.get("seat") == 2)} for e in living()]
    found = measure(on_one_clock(events, one_host=False), AIM, 3)
    assert found.next_step_s == pytest.approx(0.18)
    assert on_one_clock(events, one_host=True) == events


def test_a_pace_is_seen_once_everybody_has_committed_some_steps() -> None:
    three = [e for n in range(3) for e in attempt(n, n, 1, TWO)]
    assert not seen_enough(three, [0, 2])
    assert seen_enough([*three, *attempt(3, 3, 1, TWO)], [0, 2])
    assert not seen_enough([*three, *attempt(3, 3, 1, TWO)], [0, 1, 2])
    assert not seen_enough([*three, *votes(3, 3, 1, TWO)], [0, 2])
