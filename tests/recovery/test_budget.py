"""How much failure a job takes."""

from dataclasses import replace

import pytest

from ftkit.core.ids import MemberId, NodeId, Seat, Step
from ftkit.recovery.budget import BudgetConfig, describe_exit, exit_status, respawn
from ftkit.recovery.facts import MemberFacts, Stage
from ftkit.recovery.plan import Assignment, Stop

SEAT = Assignment(seat=Seat(1), node=NodeId(0), member=MemberId(1), failures=2, joined_step=Step(5))
DEAD = MemberFacts(
    member=MemberId(1), seat=Seat(1), node=NodeId(0), stage=Stage.DEAD, exit_code=-9, error="oops"
)


def again(step: int, *, restarts: int = 0, seat: Assignment = SEAT) -> Assignment | Stop:
    return respawn(
        seat,
        # It died as it played the step after.
        replace(DEAD, at_step=Step(step + 1)),
        step=Step(step),
        restarts=restarts,
        member=MemberId(7),
        config=BudgetConfig(same_place_max=3, progress_steps=10, restarts_max=20),
    )


def test_progress_is_forgiving() -> None:
    seat = again(15)
    assert isinstance(seat, Assignment)
    assert (seat.member, seat.failures, seat.joined_step) == (7, 1, 15)


def test_no_progress_is_counted_and_stops_the_job() -> None:
    stop = again(14)
    assert isinstance(stop, Stop)
    assert stop.code == 137
    assert "failed 3 times at or near step 15" in stop.reason
    assert stop.reason.endswith("oops")


def test_the_step_named_is_the_one_it_died_in() -> None:
    said = respawn(
        SEAT,
        replace(DEAD, at_step=Step(6)),
        step=Step(8),
        restarts=2,
        member=MemberId(7),
        config=BudgetConfig(same_place_max=3),
    )
    assert isinstance(said, Stop)
    assert "failed 3 times at or near step 6 (" in said.reason
    said = respawn(
        SEAT,
        DEAD,
        step=Step(8),
        restarts=2,
        member=MemberId(7),
        config=BudgetConfig(same_place_max=3),
    )
    assert isinstance(said, Stop)
    assert "failed 3 times before it played a step of its own, the job having committed 8 (" in (
        said.reason
    )


def test_what_the_others_did_meanwhile_is_no_progress() -> None:
    """Survivors train while a seat that always fails is replaced."""
    never_in = replace(DEAD, at_step=Step(0))
    let_in_late = replace(DEAD, entry_step=Step(90), at_step=Step(100))
    for dead in (never_in, let_in_late):
        stop = respawn(
            SEAT,
            dead,
            step=Step(99),
            restarts=2,
            member=MemberId(7),
            config=BudgetConfig(same_place_max=3, progress_steps=10),
        )
        assert isinstance(stop, Stop)


def test_what_a_drill_strikes_is_not_one_of_those_a_job_may_replace() -> None:
    dead = replace(DEAD, at_step=Step(16), drilled=True)
    config = BudgetConfig(restarts_max=0)
    step, member = Step(15), MemberId(7)
    for counts, kind in ((True, Stop), (False, Assignment)):
        after = respawn(
            SEAT, dead, step=step, restarts=0, member=member, config=config, counts=counts
        )
        assert isinstance(after, kind)


def test_a_job_restarts_only_so_often_in_all() -> None:
    assert isinstance(again(15, restarts=19), Assignment)
    stop = again(15, restarts=20)
    assert isinstance(stop, Stop)
    assert "20 processes were replaced" in stop.reason


@pytest.mark.parametrize(
    ("code", "words", "status"),
    [
        (None, "lost with its node", 1),
        (0, "exited with 0", 1),
        (3, "exited with 3", 3),
        (-9, "killed by SIGKILL", 137),
        (-99, "killed by signal 99", 227),
    ],
)
def test_exit_codes_in_words_and_for_the_shell(code: int | None, words: str, status: int) -> None:
    assert describe_exit(code) == words
    assert exit_status(code) == status


@pytest.mark.parametrize("wrong", [{"same_place_max": 0}, {"restarts_max": -1}])
def test_a_budget_that_makes_no_sense_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="budget"):
        BudgetConfig(**wrong)  # type: ignore[arg-type]
