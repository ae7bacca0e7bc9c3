"""What a rank does about a plan."""

from dataclasses import replace

import pytest

from ftkit.core.ids import Generation, MemberId, Term
from ftkit.recovery.facts import Stage
from ftkit.recovery.member import Duty, Standing, react
from ftkit.recovery.plan import Plan, Stop, adopt
from tests.recovery.stories import newcomer, training


def standing(
    member: int, stage: Stage, *, generation: int = 0, linked: int = 0, prepared: int = 0
) -> Standing:
    return Standing(
        member=MemberId(member),
        stage=stage,
        generation=Generation(generation),
        linked=Generation(linked),
        prepared=Generation(prepared),
    )


def halting() -> Plan:
    story = training()
    story.says(0, Stage.DEAD, exit_code=-9).moves()
    return story.plan


def test_without_a_plan_there_is_nothing_to_do() -> None:
    for stage in Stage:
        assert react(standing(0, stage, generation=1), Plan()) == (Duty.NOTHING, None)


def test_a_member_of_the_world_resumes_once() -> None:
    plan = training().plan
    assert react(standing(0, Stage.READY), plan) == (Duty.RESUME, plan.world)
    assert react(standing(0, Stage.ACTIVE, generation=1), plan) == (Duty.NOTHING, None)


@pytest.mark.parametrize("stage", [Stage.ACTIVE, Stage.READY, Stage.LINKED, Stage.HALTED])
def test_every_standing_acknowledges_a_halt_once(stage: Stage) -> None:
    plan = halting()
    assert react(standing(1, stage, generation=0), plan)[0] is Duty.HALT
    acknowledged = standing(1, Stage.HALTED if stage is Stage.ACTIVE else stage, generation=1)
    assert react(acknowledged, plan) == (Duty.NOTHING, None)


def test_an_active_member_halts_in_the_very_generation_that_is_over() -> None:
    assert react(standing(1, Stage.ACTIVE, generation=1), halting())[0] is Duty.HALT


@pytest.mark.parametrize("stage", [Stage.STARTING, Stage.DONE])
def test_who_is_not_yet_or_no_more_in_training_has_nothing_to_halt(stage: Stage) -> None:
    assert react(standing(1, stage), halting()) == (Duty.NOTHING, None)


def test_a_newcomer_links_to_the_world_and_again_to_the_next() -> None:
    plan = newcomer().plan
    assert react(standing(3, Stage.READY, generation=1), plan) == (Duty.LINK, plan.world)
    linked = standing(3, Stage.LINKED, generation=1, linked=2)
    assert react(linked, plan) == (Duty.NOTHING, None)
    assert react(replace(linked, linked=Generation(1)), plan)[0] is Duty.LINK


def test_members_prepare_once_for_a_newcomer_and_it_waits_for_the_vote() -> None:
    story = newcomer()
    story.moves()
    plan = story.plan
    assert react(standing(1, Stage.ACTIVE, generation=2), plan) == (Duty.PREPARE, plan.joining)
    prepared = standing(1, Stage.ACTIVE, generation=2, prepared=3)
    assert react(prepared, plan) == (Duty.NOTHING, None)
    assert react(standing(1, Stage.ACTIVE, generation=3), plan) == (Duty.NOTHING, None)
    waiting = standing(3, Stage.LINKED, generation=1, linked=2)
    assert react(waiting, plan) == (Duty.NOTHING, None)


def test_a_grown_world_is_not_entered_from_standing_still() -> None:
    story = newcomer()
    story.moves()
    story.says(1, Stage.ACTIVE, generation=Generation(3)).moves()
    waiting = standing(3, Stage.LINKED, generation=1, linked=2)
    assert react(waiting, story.plan) == (Duty.NOTHING, None)


def test_who_wakes_up_and_finds_its_seat_taken_leaves() -> None:
    plan = halting()
    asleep = standing(0, Stage.ACTIVE, generation=1)
    assert react(asleep, plan)[0] is Duty.LEAVE
    taken_over = adopt([plan], term=Term(2))
    assert taken_over.version == 0
    assert react(asleep, taken_over)[0] is Duty.LEAVE


def test_who_wakes_up_outside_the_world_stands_still_and_then_links() -> None:
    story = training()
    story.says(0, Stage.HALTED).says(1, Stage.HALTED)
    story.knows(evictions={MemberId(2): "stopped"}).moves()
    kept = replace(story.plan, evicted={})
    asleep = standing(2, Stage.ACTIVE, generation=1)
    assert react(asleep, kept)[0] is Duty.HALT
    assert react(standing(2, Stage.HALTED, generation=1), kept) == (Duty.LINK, kept.world)
    assert react(asleep, story.plan)[0] is Duty.LEAVE, "it was evicted"


def test_everybody_leaves_a_job_that_is_over() -> None:
    plan = training().plan.revised(stop=Stop(code=0, reason="done"))
    for stage in Stage:
        assert react(standing(0, stage, generation=1), plan)[0] is Duty.LEAVE
