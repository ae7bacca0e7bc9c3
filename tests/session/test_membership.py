"""Membership: what is decided once, under the lock, between plans, faults and votes."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from ftkit.core.errors import JobStopped, ProtocolError
from ftkit.core.ids import Generation, MemberId, NodeId, Seat, Step, Term
from ftkit.core.trace import Trace, read_events
from ftkit.core.world import Member, World
from ftkit.recovery.plan import Assignment, Mode, Plan, Stop
from ftkit.session.membership import Entry, Fate, Link, Membership, admission

T = TypeVar("T")


def world(generation: int, *members: int) -> World:
    """Member m sits in seat m % 10: 11 replaces 1."""
    return World.of(
        Generation(generation),
        [
            Member(
                member=MemberId(m), seat=Seat(m % 10), node=NodeId(0), host="127.0.0.1", port=1 + m
            )
            for m in members
        ],
    )


def plan(version: int, *, members: tuple[int, ...] = (0, 1, 2), term: int = 1, **more: Any) -> Plan:
    seats = tuple(
        Assignment(seat=Seat(m % 10), node=NodeId(0), member=MemberId(m)) for m in members
    )
    return Plan(term=Term(term), version=version, seats=seats, **more)


def running(version: int, at: World, step: int, **more: Any) -> Plan:
    """A plan whose members enter `at` from standing still."""
    given: dict[str, Any] = {
        "mode": Mode.RUNNING,
        "resumed": at.generation,
        "halted": at.generation - 1,
    }
    return plan(version, world=at, step=Step(step), **(given | more))


class Rank:
    """A membership, and everything it said and did."""

    def __init__(self, member: int, folder: Path) -> None:
        self.said: list[dict[str, Any]] = []
        self.aborted: list[tuple[int, str]] = []
        self.unlinked: set[int] = set()
        self.parted: set[int] = set()
        self.path = folder / "events.jsonl"
        self.trace = Trace(self.path)
        self.membership = Membership(
            MemberId(member),
            report=self.said.append,
            abort=lambda generation, reason: self.aborted.append((generation, reason)),
            unlinked=lambda: frozenset(MemberId(m) for m in self.unlinked),
            parted=lambda world: world.member_ids & {MemberId(m) for m in self.parted},
            trace=self.trace,
        )

    @property
    def last(self) -> dict[str, Any]:
        return self.said[-1]

    def events(self) -> list[dict[str, Any]]:
        return list(read_events(self.path))


@pytest.fixture
def rank(tmp_path: Path) -> Iterator[Rank]:
    one = Rank(0, tmp_path)
    yield one
    one.trace.close()


@pytest.fixture
def active(rank: Rank) -> Rank:
    """In generation 1 of three ranks, at step 5, stepping."""
    rank.membership.ready(stepping=True)
    rank.membership.take_plan(running(1, world(1, 0, 1, 2), 0))
    assert rank.membership.next_task() == Entry(world(1, 0, 1, 2), Step(0), False)
    rank.membership.entered(world(1, 0, 1, 2), Step(5))
    assert rank.membership.next_task() is None
    return rank


def waiting(question: Callable[[], T], then: Callable[[], object]) -> T:
    """The answer to a question that blocks until `then` has been done."""
    answers: list[T] = []
    errors: list[BaseException] = []

    def ask() -> None:
        try:
            answers.append(question())
        except BaseException as error:  # noqa: BLE001  # handed to the test
            errors.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join(0.05)
    assert thread.is_alive(), f"it did not wait: {answers} {errors}"
    then()
    thread.join(10)
    assert not thread.is_alive(), "it never answered"
    if errors:
        raise errors[0]
    return answers[0]


HALT = plan(2, mode=Mode.HALTING, world=world(1, 0, 1, 2), resumed=Generation(1),
            halted=Generation(1))  # fmt: skip


# ---- joining


def test_it_introduces_itself_and_waits_for_a_plan(rank: Rank) -> None:
    first = plan(1)
    assert waiting(rank.membership.introduce, lambda: rank.membership.take_plan(first)) is first
    assert [s["stage"] for s in rank.said] == ["starting"]
    assert rank.membership.step is None
    assert not rank.membership.active


def test_ready_is_said_once_and_again_when_it_begins_to_step(rank: Rank) -> None:
    rank.membership.ready(stepping=False)
    rank.membership.ready(stepping=True)
    assert [(s["stage"], s["stepping"]) for s in rank.said] == [("ready", False), ("ready", True)]


def test_an_active_rank_stays_active_when_it_begins_to_step(rank: Rank) -> None:
    rank.membership.ready(stepping=False)
    rank.membership.entered(world(1, 0), Step(0))
    rank.membership.ready(stepping=True)
    assert rank.last["stage"] == "active"
    assert rank.last["stepping"]


def test_next_task_waits_for_a_world(rank: Rank) -> None:
    rank.membership.ready(stepping=True)
    first = world(1, 0, 1, 2)
    task = waiting(
        rank.membership.next_task, lambda: rank.membership.take_plan(running(1, first, 0))
    )
    assert task == Entry(first, Step(0), False)


def test_who_waits_for_a_world_says_so_and_who_has_a_task_does_not(rank: Rank) -> None:
    rank.membership.ready(stepping=True)
    said: list[str] = []
    note = lambda: said.append(rank.last["stage"])
    give = lambda: rank.membership.take_plan(running(1, world(1, 0, 1, 2), 0))
    waiting(lambda: rank.membership.next_task(note), give)
    assert said == ["ready"]
    rank.membership.entered(world(1, 0, 1, 2), Step(0))
    assert rank.membership.next_task(note) is None
    assert said == ["ready"]


def test_an_older_or_equal_plan_is_ignored(active: Rank) -> None:
    said = len(active.said)
    active.membership.take_plan(plan(1, mode=Mode.HALTING, halted=Generation(9)))
    active.membership.take_plan(plan(99, term=0, mode=Mode.HALTING, halted=Generation(9)))
    assert active.membership.active
    assert len(active.said) == said
    assert not active.aborted


# ---- the vote


def vote(of: Rank) -> None:
    of.membership.vote_cast()


def test_a_vote_that_passes_counts_the_step(active: Rank) -> None:
    vote(active)
    assert active.membership.vote_passed(Generation(1))
    assert active.membership.step == 6


def test_a_fault_after_the_commitment_reports_the_new_step(active: Rank) -> None:
    vote(active)
    assert active.membership.vote_passed(Generation(1))
    active.membership.take_fault(Generation(1), frozenset({MemberId(1)}), "it broke")
    assert (active.last["stage"], active.last["step"], active.last["voted"]) == ("halted", 6, False)
    assert active.aborted == [(1, "it broke")]
    (report,) = (e for e in active.events() if e["kind"] == "report")
    assert (report["step"], report["voted"], report["lost"]) == (6, False, [1])


def test_a_fault_before_the_commitment_keeps_it_from_committing(active: Rank) -> None:
    vote(active)
    active.membership.take_fault(Generation(1), frozenset(), "it broke")
    assert (active.last["step"], active.last["voted"]) == (5, True)
    assert not active.membership.vote_passed(Generation(1))
    assert active.membership.step == 5


def test_a_vote_of_an_older_generation_does_not_count(active: Rank) -> None:
    vote(active)
    assert not active.membership.vote_passed(Generation(0))
    assert active.membership.step == 5


def test_a_vote_that_failed_is_not_voted_for(active: Rank) -> None:
    vote(active)
    active.membership.vote_failed()
    active.membership.take_plan(HALT)
    assert (active.last["stage"], active.last["voted"]) == ("halted", False)


@pytest.mark.parametrize(("resumed_at", "fate", "step"), [(6, Fate.FORWARD, 6), (5, Fate.BACK, 5)])
def test_the_fate_of_a_vote_is_where_the_others_stand(
    active: Rank, resumed_at: int, fate: Fate, step: int
) -> None:
    vote(active)
    active.membership.take_fault(Generation(1), frozenset({MemberId(1)}), "it broke")
    active.membership.take_plan(HALT)
    second = world(2, 0, 2)
    said = waiting(
        active.membership.fate,
        lambda: active.membership.take_plan(
            running(3, second, resumed_at, members=(0, 11, 2))
        ),
    )  # fmt: skip
    assert said is fate
    assert active.membership.step == step
    # Entering the world is the step loop's, and comes next.
    assert active.membership.next_task() == Entry(second, Step(resumed_at), False)


def test_without_a_vote_nothing_rolls_forward(active: Rank) -> None:
    active.membership.take_plan(HALT)
    active.membership.take_plan(running(3, world(2, 0, 2), 6, members=(0, 11, 2)))
    assert active.membership.fate() is Fate.BACK
    assert active.membership.step == 5


def test_a_member_left_out_rolls_back_and_links_anew(active: Rank) -> None:
    vote(active)
    active.membership.take_plan(HALT)
    without = running(3, world(2, 1, 2), 6)
    active.membership.take_plan(without)
    assert active.membership.fate() is Fate.BACK
    assert active.membership.next_task() == Link(world(2, 1, 2))
    active.membership.linked(world(2, 1, 2))
    assert (active.last["stage"], active.last["linked"], active.last["step"]) == ("linked", 2, None)
    assert not active.last["voted"]


def test_the_job_may_stop_while_the_fate_is_open(active: Rank) -> None:
    vote(active)
    active.membership.take_plan(HALT)
    ended = plan(3, mode=Mode.ENDED, stop=Stop(code=1, reason="enough"), halted=Generation(1))
    with pytest.raises(JobStopped, match="enough"):
        waiting(active.membership.fate, lambda: active.membership.take_plan(ended))


# ---- halting


def test_a_plan_that_halts_ends_the_generation_at_once(active: Rank) -> None:
    active.membership.take_plan(HALT)
    assert not active.membership.active
    assert active.last["stage"] == "halted"
    assert active.aborted == [(1, "the coordinator ended it")]
    active.membership.take_plan(plan(3, mode=Mode.HALTING, world=world(1, 0, 1, 2),
                                     resumed=Generation(1), halted=Generation(1)))  # fmt: skip
    assert len(active.aborted) == 1, "halting twice is halting once"


def test_faults_of_other_generations_and_of_the_halted_are_nothing_new(active: Rank) -> None:
    active.membership.take_fault(Generation(0), frozenset(), "late")
    active.membership.take_fault(Generation(2), frozenset(), "early")
    assert active.membership.active
    active.membership.take_fault(Generation(1), frozenset(), "now")
    said = len(active.said)
    active.membership.take_fault(Generation(1), frozenset(), "again")
    assert len(active.said) == said


def test_a_halt_while_entering_leaves_what_was_entered(active: Rank) -> None:
    active.membership.take_plan(HALT)
    second = world(2, 0, 2)
    active.membership.take_plan(running(3, second, 5, members=(0, 11, 2)))
    task = active.membership.next_task()
    assert task == Entry(second, Step(5), False)
    # While the links come up, another member is lost.
    active.membership.take_plan(
        plan(4, members=(0, 11, 12), mode=Mode.HALTING, world=second, resumed=Generation(2),
             halted=Generation(2))
    )  # fmt: skip
    active.membership.entered(second, Step(5))
    assert not active.membership.active
    assert (active.last["stage"], active.last["generation"]) == ("halted", 2)
    third = world(3, 0)
    active.membership.take_plan(running(5, third, 5, members=(0, 11, 12)))
    assert active.membership.next_task() == Entry(third, Step(5), False)


def test_a_world_that_cannot_be_entered_is_reported_as_over(active: Rank) -> None:
    active.membership.take_plan(HALT)
    second = world(2, 0, 2)
    active.membership.take_plan(running(3, second, 5, members=(0, 11, 2)))
    active.membership.next_task()
    active.membership.refused(second, "no link to member 2", cut=frozenset({MemberId(2)}))
    assert (active.last["stage"], active.last["generation"]) == ("halted", 2)
    assert active.last["cut"] == [2]
    assert active.membership.step == 5


def test_a_rank_names_the_links_it_lost_itself_and_not_what_others_told_it(active: Rank) -> None:
    active.unlinked = {1}
    active.membership.take_fault(Generation(1), frozenset({MemberId(2)}), "as told by another")
    assert active.last["cut"] == [1]
    active.membership.take_plan(running(2, world(2, 0, 1, 2), 5))
    active.membership.entered(world(2, 0, 1, 2), Step(5))
    assert active.last["cut"] == []


def test_a_rank_that_had_no_state_yet_is_ready_again(rank: Rank) -> None:
    rank.membership.ready(stepping=True)
    rank.membership.take_plan(running(1, world(1, 0, 1, 2), 7))
    rank.membership.entered(world(1, 0, 1, 2), None)
    rank.membership.take_fault(Generation(1), frozenset(), "while it loaded")
    assert (rank.last["stage"], rank.last["step"]) == ("ready", None)
    assert not rank.membership.restored(Generation(1), Step(7))
    assert rank.membership.step is None


# ---- newcomers


def test_a_newcomer_links_and_is_let_in_by_a_member(rank: Rank) -> None:
    trained = running(1, world(1, 1, 2), 0)
    rank.membership.take_plan(trained)
    assert rank.membership.introduce() is trained
    rank.membership.ready(stepping=True)
    assert rank.membership.next_task() == Link(world(1, 1, 2))
    rank.membership.linked(world(1, 1, 2))
    grown = world(2, 0, 1, 2)
    rank.membership.take_plan(
        plan(2, mode=Mode.RUNNING, world=world(1, 1, 2), resumed=Generation(1), joining=grown)
    )
    assert rank.membership.prepared is None, "it is not a member that switches"
    task = waiting(
        rank.membership.next_task,
        lambda: rank.membership.take_admission(admission(grown, Step(41))),
    )
    assert task == Entry(grown, Step(41), True)
    rank.membership.entered(grown, None)
    assert rank.last["stage"] == "active"
    assert rank.membership.restored(Generation(2), Step(41))
    assert rank.last["step"] == 41


def test_a_newcomer_that_was_let_go_of_connects_anew(rank: Rank) -> None:
    trained = world(2, 1, 2)
    rank.membership.take_plan(running(1, trained, 0))
    rank.membership.ready(stepping=True)
    assert rank.membership.next_task() == Link(trained)
    rank.parted = {7}
    rank.membership.linked(trained)
    rank.parted = {2, 7}  # it enters the world only now, and this rank was in the one before
    assert rank.membership.next_task() == Link(trained)
    assert (rank.last["stage"], rank.last["linked"]) == ("ready", 0)
    rank.parted = set()
    rank.membership.linked(trained)
    assert rank.last["stage"] == "linked"


def test_every_member_tells_it_and_it_enters_once(rank: Rank) -> None:
    rank.membership.ready(stepping=True)
    grown = world(2, 0, 1, 2)
    for _ in range(2):
        rank.membership.take_admission(admission(grown, Step(4)))
    assert rank.membership.next_task() == Entry(grown, Step(4), True)
    rank.membership.entered(grown, Step(4))
    rank.membership.take_admission(admission(grown, Step(4)))  # late
    assert rank.membership.next_task() is None


def test_the_newest_admission_counts_and_one_that_was_halted_does_not(rank: Rank) -> None:
    rank.membership.ready(stepping=True)
    rank.membership.take_admission(admission(world(4, 0, 1), Step(9)))
    rank.membership.take_admission(admission(world(3, 0, 1, 2), Step(8)))
    assert rank.membership.next_task() == Entry(world(4, 0, 1), Step(9), True)
    rank.membership.take_admission(admission(world(5, 0, 1), Step(10)))
    rank.membership.take_plan(
        plan(1, mode=Mode.HALTING, world=world(4, 0, 1), halted=Generation(5))
    )
    resumed = world(6, 1, 2)
    task = waiting(
        rank.membership.next_task,
        lambda: rank.membership.take_plan(running(2, resumed, 10)),
    )
    assert task == Link(resumed)


@pytest.mark.parametrize(
    "payload", [b"", b"\xff", b"[]", b"{}", b'{"world": 1, "step": 2}', b"null"]
)
def test_an_admission_that_is_none_is_refused(rank: Rank, payload: bytes) -> None:
    with pytest.raises(ProtocolError):
        rank.membership.take_admission(payload)


def test_members_prepare_for_newcomers_and_forget_them_once_they_are_in(active: Rank) -> None:
    offered = [active.membership.prepared]
    grown = world(2, 0, 1, 2, 3)
    active.membership.take_plan(
        plan(2, members=(0, 1, 2, 3), mode=Mode.RUNNING, world=world(1, 0, 1, 2),
             resumed=Generation(1), joining=grown)
    )  # fmt: skip
    offered.append(active.membership.prepared)
    active.membership.entered(grown, Step(6))
    offered.append(active.membership.prepared)
    assert offered == [None, grown, None]


# ---- leaving


def test_one_whose_seat_is_taken_leaves(active: Rank) -> None:
    active.membership.take_plan(running(2, world(1, 0, 1, 2), 0, members=(10, 1, 2)))
    with pytest.raises(JobStopped, match="another process has this seat"):
        active.membership.next_task()
    assert active.aborted


def test_one_that_is_evicted_leaves(active: Rank) -> None:
    active.membership.take_plan(
        running(2, world(1, 0, 1, 2), 0, evicted={MemberId(0): "it hangs"})
    )  # fmt: skip
    with pytest.raises(JobStopped):
        active.membership.next_task()


def test_the_end_wakes_whoever_waits(rank: Rank) -> None:
    rank.membership.ready(stepping=True)
    ended = plan(1, mode=Mode.ENDED, stop=Stop(code=1, reason="the machine goes down"))
    with pytest.raises(JobStopped, match="the machine goes down"):
        waiting(rank.membership.next_task, lambda: rank.membership.take_plan(ended))
    with pytest.raises(JobStopped, match="the machine goes down"):
        rank.membership.introduce()


def test_a_plan_wakes_whoever_waits_for_any_change(rank: Rank) -> None:
    waiting(lambda: rank.membership.wait_changed(60), lambda: rank.membership.take_plan(plan(1)))
    rank.membership.wait_changed(0.0)


def test_done_is_said_and_halts_no_more(active: Rank) -> None:
    active.membership.done()
    active.membership.take_plan(HALT)
    assert active.last["stage"] == "done"
    assert not active.aborted


# ---- races


def test_a_fault_and_a_vote_at_once_agree_on_one_order(tmp_path: Path) -> None:
    """Whatever comes first, what was reported is what was committed."""
    for i in range(200):
        (tmp_path / str(i)).mkdir()
        rank = Rank(0, tmp_path / str(i))
        rank.membership.ready(stepping=True)
        rank.membership.entered(world(1, 0, 1), Step(5))
        rank.membership.vote_cast()
        barrier = threading.Barrier(2)
        passed: list[bool] = []

        def count(rank: Rank = rank, barrier: Any = barrier, passed: Any = passed) -> None:
            barrier.wait()
            passed.append(rank.membership.vote_passed(Generation(1)))

        thread = threading.Thread(target=count)
        thread.start()
        barrier.wait()
        rank.membership.take_fault(Generation(1), frozenset(), "now")
        thread.join()
        reported = (rank.last["step"], rank.last["voted"])
        assert reported == ((6, False) if passed == [True] else (5, True))
        rank.trace.close()
