"""Who is struck when, in drills that go on for a while; and what is said of joins and links."""

from pathlib import Path
from typing import Any

import pytest

from ftkit.core.errors import UsageError
from ftkit.core.fault_plan import Kind, Point
from ftkit.launch.checker import Answer, Outcome
from ftkit.launch.drill_catalogue import CHURN, FLAP, JOIN, KILL_IN_COLLECTIVE, PARTITION, STRIKES
from ftkit.launch.drill_job import Job
from ftkit.launch.drill_plan import Drill, choose
from ftkit.launch.member_drills import MemberStriker, judge_join

JOB = Job(nproc=3, steps=300)


class Striker(MemberStriker):
    """One that is told of events and tells whom it would kill."""

    def __init__(self, fault: str, folder: Path, seed: int = 1) -> None:
        self.drill: Drill = choose(fault, None, seed=seed, nproc=3, steps=JOB.steps)
        super().__init__(self.drill, JOB, folder)
        self.members = {0: 0, 1: 1, 2: 2}
        for seat in self.members:
            self.spawn(seat, seat)

    def spawn(self, seat: int, member: int) -> None:
        self.members[seat] = member
        self._take({"kind": "spawn", "seat": seat, "member": member, "pid": 1 << 30})

    def commits(self, first: int, last: int) -> None:
        for step in range(first, last + 1):
            for seat, member in self.members.items():
                self._take({"kind": "commit", "seat": seat, "member": member, "step": step})


def test_a_flapping_rank_is_struck_each_time_it_has_made_progress(tmp_path: Path) -> None:
    striker = Striker(FLAP, tmp_path)
    seat, step = striker.drill.seat, striker.drill.step + 11
    striker.commits(1, step)
    for strike in range(STRIKES[FLAP]):
        assert striker.due(0.0) == seat
        striker._strike(seat)
        assert striker.due(0.0) is None, "it is gone"
        striker.spawn(seat, 10 + strike)
        striker.commits(step + 1, step + 10)
        assert striker.due(0.0) is None, "it has just come back"
        striker.commits(step + 11, step + 12)
        step += 12
    assert striker.due(0.0) is None, "three times are enough"


def test_churn_spares_one_seat_and_stops_while_there_are_steps_left(tmp_path: Path) -> None:
    struck = set[int]()
    for seed in range(20):
        striker = Striker(CHURN, tmp_path, seed)
        striker.commits(1, 120)
        first = striker.due(0.0)
        assert first is not None
        struck.add(first)
        assert len(striker._seats) == 2
        striker._strike(first)
        assert striker.due(striker._next_s - 0.1) is None, "not so soon"
        assert striker.due(striker._next_s + 0.1) not in (None, first)
        striker.commits(121, 201)
        assert striker.due(striker._next_s + 9) is None
    assert struck == {0, 1, 2}


def test_small_jobs_and_faults_that_fit_no_point_are_refused() -> None:
    for fault in (CHURN, PARTITION):
        with pytest.raises(UsageError, match="needs --nproc 3 or more, got 2"):
            choose(fault, None, seed=0, nproc=2, steps=100)
    with pytest.raises(UsageError, match="cannot strike at a byte"):
        choose("hang", "in-collective", seed=0, nproc=3, steps=100)


def test_a_kill_in_a_collective_has_a_byte_that_the_seed_chose() -> None:
    drills = [choose(KILL_IN_COLLECTIVE, None, seed=s, nproc=3, steps=100) for s in range(9)]
    (fault,) = drills[0].faults()
    assert (fault.kind, fault.point) == (Kind.KILL, Point.IN_COLLECTIVE)
    assert len({d.byte for d in drills}) == 9
    assert {d.seat for d in drills} == {0, 1, 2}
    link = choose(PARTITION, None, seed=3, nproc=3, steps=100)
    assert link.second_seat not in (None, link.seat)
    assert link.faults() == []


def outcome(fault: str) -> Outcome:
    return Outcome(
        outcome=Answer.PASS, fault=fault, phase="any", seed=0, detect_s=None, repair_s=None,
        steps_lost=0, samples_lost=0, samples_doubled=0, survivor_exits=0, params_equal=True,
        verdict=None, evidence={"problems": [], "missing": []},
    )  # fmt: skip


def event(mono: float, kind: str, **more: Any) -> dict[str, Any]:
    return {"mono": mono, "kind": kind, **more}


JOINED = [
    event(1.0, "drill", seat=1, member=1),
    event(1.05, "commit", member=0, step=4, generation=1),
    event(1.1, "rollback", member=0, reason="the fault itself"),
    event(1.2, "commit", member=0, step=5, generation=2),
    event(1.5, "commit", member=0, step=6, generation=2),
    event(2.0, "admit", seat=1, member=3, step=6),
    event(2.1, "commit", member=0, step=7, generation=3),
    event(0.9, "commit", member=0, step=3, generation=1),
]


def test_a_join_may_not_take_anybody_back() -> None:
    good = judge_join(outcome(JOIN), JOINED)
    assert good.outcome is Answer.PASS
    assert good.evidence["joined"] == [{"member": 3, "step": 6, "longest_gap_s": 0.6}]
    bad = judge_join(outcome(JOIN), [*JOINED, event(1.8, "rollback", member=0, reason="hm")])
    assert bad.outcome is Answer.FAIL
    assert bad.evidence["problems"] == ["a rollback (hm) while member 3 came in"]
    assert judge_join(outcome(JOIN), JOINED[:5]).outcome is Answer.UNKNOWN
