"""The protocol where state is sharded: nobody goes on from what it holds, all begin from snapshots."""

from typing import Any

import pytest

from ftkit.core import exit_codes
from ftkit.core.ids import Generation, MemberId, NodeId, Seat, Step
from ftkit.recovery.approximation import Approximation
from ftkit.recovery.facts import Allowed, Stage
from ftkit.recovery.plan import Mode
from ftkit.recovery.policy import Option
from tests.recovery.stories import Story

SHARDED: dict[str, Any] = {"sharded": True, "stepping": True}


def training(step: int, **kind: Any) -> Story:
    """Three members of generation 1, in step `step` + 1; memory has step `step` - 1 whole."""
    story = Story(**kind).all_say(Stage.READY)
    story.moves()
    story.all_say(
        Stage.ACTIVE, generation=Generation(1), step=Step(step), at_step=Step(step + 1), **SHARDED
    )
    return story.knows(snapshots=frozenset({Step(step - 1)}))


def given_up(story: Story, *members: int, generation: int = 1) -> Story:
    for member in members:
        story.says(member, Stage.READY, generation=Generation(generation), step=None)
    return story


def test_survivors_begin_from_memory_without_the_seat_that_is_empty() -> None:
    story = training(9)
    story.says(0, Stage.DEAD, exit_code=-9)
    story.says(1, Stage.HALTED).says(2, Stage.HALTED, step=Step(10))
    assert story.moves() == ["respawn"], "they have not given up their shards yet"
    given_up(story, 1)
    assert story.moves() == []
    given_up(story, 2)
    assert story.moves() == ["reform", "form"]
    assert (story.world, story.plan.step, story.plan.mode) == ([1, 2], 8, Mode.RUNNING)


def test_what_memory_holds_is_asked_for_after_all_stand_still() -> None:
    """Parity may have to be looked at first; the step that was whole before may be whole no more."""
    story = training(9)
    story.says(0, Stage.DEAD, exit_code=-9)
    given_up(story, 1, 2)
    story.knows(awaited="step 7 is rebuilt from parity")
    assert story.moves() == ["respawn", "reform"]
    story.knows(awaited="", snapshots=frozenset({Step(7)}))
    assert story.moves() == ["form"]
    assert story.plan.step == 7


def test_an_evicted_member_is_waited_for_until_it_cannot_write_any_more() -> None:
    story = training(9)
    story.knows(evictions={MemberId(0): "stopped"})
    given_up(story, 1, 2)
    assert story.moves()[-1] == "reform"
    assert story.plan.mode is Mode.FORMING
    story.says(0, Stage.DEAD, exit_code=-9).knows(evictions={})
    assert story.moves() == ["respawn", "form"]
    assert story.world == [1, 2]


def test_a_lost_node_is_not_waited_for() -> None:
    story = training(9, nodes=3, seats=1)
    story.knows(nodes_lost=frozenset({NodeId(0)}))
    given_up(story, 1, 2)
    assert story.moves()[-1] == "form"
    assert story.world == [1, 2]


def test_a_second_loss_while_they_build() -> None:
    story = training(9)
    story.says(0, Stage.DEAD, exit_code=-9)
    given_up(story, 1, 2).moves()
    # In generation 2, without state yet.
    story.says(1, Stage.ACTIVE, generation=Generation(2), step=None)
    story.says(2, Stage.DEAD, exit_code=-9)
    assert story.moves() == ["respawn"]
    given_up(story, 1, generation=2)
    assert story.moves() == ["reform", "form"]
    assert (story.world, story.plan.step, story.generation) == ([1], 8, 3)


def test_a_newcomer_that_has_come_so_far_is_taken_along() -> None:
    story = training(9)
    story.says(0, Stage.DEAD, exit_code=-9)
    given_up(story, 1).moves()
    story.says(3, Stage.READY, seat=0, generation=Generation(1), **SHARDED)
    given_up(story, 2)
    assert story.moves() == ["reform", "form"]
    assert story.world == [3, 1, 2]


def test_shards_that_are_nowhere_end_the_job_with_the_reason() -> None:
    story = training(9)
    story.says(0, Stage.DEAD, exit_code=-9).knows(snapshots=frozenset())
    given_up(story, 1, 2)
    assert story.moves()[-1] == "end"
    assert story.plan.stop is not None
    assert story.plan.stop.code == exit_codes.UNRECOVERABLE
    assert "step 10" in story.plan.stop.reason


@pytest.mark.parametrize("step", [1, 2, 3])
def test_before_the_first_snapshot_the_job_begins_anew(step: int) -> None:
    story = training(step)
    story.says(0, Stage.DEAD, exit_code=-9).knows(snapshots=frozenset())
    given_up(story, 1, 2)
    assert story.moves()[-1] == "form"
    assert story.plan.step == 0


def test_after_the_loss_of_all_every_seat_is_waited_for() -> None:
    story = training(9)
    for member in (0, 1, 2):
        story.says(member, Stage.DEAD, exit_code=-9)
    story.moves()
    story.says(3, Stage.READY, seat=0, generation=Generation(1))
    story.says(4, Stage.READY, seat=1, generation=Generation(1))
    assert story.moves() == []
    story.says(5, Stage.READY, seat=2, generation=Generation(1))
    assert story.moves() == ["form"]
    assert (story.world, story.plan.step) == ([3, 4, 5], 8)


def without_a_step(**known: Any) -> Story:
    """Seat 0 is lost, and with it every step; two members stand ready."""
    story = training(9)
    story.says(0, Stage.DEAD, exit_code=-9).knows(snapshots=frozenset(), **known)
    return given_up(story, 1, 2)


def test_the_end_names_what_is_lost_and_the_option_that_would_go_on() -> None:
    story = without_a_step(lacking="of step 8 the shards of seats [0] are lost")
    assert story.moves()[-1] == "end"
    assert story.plan.stop is not None
    assert "the shards of seats [0] are lost" in story.plan.stop.reason
    assert "allow_approximate=True" in story.plan.stop.reason
    asked = without_a_step(lacking="why")
    for member in (1, 2):
        asked.says(member, Stage.READY, allowed=Allowed.STAGES)
    assert asked.moves()[-1] == "end"
    assert asked.plan.stop is not None
    assert "allow_approximate" not in asked.plan.stop.reason, "it was given"


def test_a_world_is_told_what_its_state_is_made_of_and_the_next_one_is_not() -> None:
    mixed = Approximation(
        way=Option.CHECKFREE, step=Step(8), generation=Generation(1),
        seats=tuple(map(Seat, range(3))), lost=(Seat(0),), layouts=2,
    )  # fmt: skip
    story = without_a_step(approximation=mixed)
    assert story.moves()[-1] == "form"
    assert (story.plan.step, story.plan.approximation, story.world) == (8, mixed, [1, 2])
    story.says(1, Stage.ACTIVE, generation=Generation(2), step=Step(8))
    story.says(2, Stage.DEAD, exit_code=-9)
    story.knows(approximation=None, snapshots=frozenset({Step(9)}))
    given_up(story, 1, generation=2)
    story.moves()
    assert (story.plan.step, story.plan.approximation) == (9, None)
