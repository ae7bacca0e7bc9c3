"""What the coordinator makes of reports when a shard is lost, and that it says so aloud."""

import logging
from dataclasses import replace
from typing import Any

import pytest

from ftkit.core.ids import Generation, MemberId, NodeId, Seat, Step
from ftkit.core.inventory import Copy, Part
from ftkit.launch.approximate_lead import tell_approximation, with_remains
from ftkit.launch.approximate_story import approximate_story
from ftkit.recovery.costs import Costs
from ftkit.recovery.facts import Allowed, Stage
from ftkit.recovery.policy import Option
from tests.recovery.stories import Story

COSTS = Costs(world=3)


def copy(seat: int, step: int) -> Copy:
    return Copy(
        seat=Seat(seat), node=NodeId(seat), path=f"{seat}", step=Step(step),
        generation=Generation(1),
        part=Part(layout=f"stage{seat}", first=0, end=9, total=9, layouts=3),
    )  # fmt: skip


LEFT = (copy(0, 40), copy(2, 40), copy(2, 41))


def lost_stage(allowed: Allowed = Allowed.STAGES) -> Story:
    """A pipeline of three nodes has lost the one in the middle; the others gave up their stages."""
    story = Story(nodes=3, seats=1).all_say(Stage.READY)
    story.moves()
    story.all_say(
        Stage.ACTIVE, generation=Generation(1), step=Step(41), at_step=Step(42), sharded=True,
        stepping=True, allowed=allowed,
    )  # fmt: skip
    story.knows(nodes_lost=frozenset({NodeId(1)}))
    for member in (0, 2):
        story.says(member, Stage.READY, generation=Generation(1), step=None)
    return story


def kept(step: int) -> dict[NodeId, dict[str, Any]]:
    told = {"store": ["h", 7], "copies": [copy(1, step).to_json()]}
    return {NodeId(0): {"kept": None}, NodeId(2): {"kept": told}}


def test_the_job_goes_on_from_what_a_node_keeps_and_tells_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    story = lost_stage()
    before = story.plan
    story.facts = with_remains(story.facts, before, LEFT, kept(15), COSTS)
    assert story.moves()[-1] == "form"
    mixed = story.plan.approximation
    assert mixed is not None
    assert (story.plan.step, mixed.way, mixed.lost, mixed.age) == (40, Option.STALE_SHARD, (1,), 25)
    events = list[dict[str, Any]]()

    def tell(kind: str, /, **fields: object) -> None:
        events.append({"kind": kind} | fields)

    with caplog.at_level(logging.WARNING):
        tell_approximation(before, story.plan, story.facts, tell)
    assert "is not that of an undisturbed run" in caplog.text
    ((sentence,), (event,)) = approximate_story(events), events
    assert (event["stages"], event["age"], event["way"]) == ([1], 25, "stale-shard")
    assert "seats [1] are 25 steps older" in sentence
    tell_approximation(story.plan, story.plan.revised(), story.facts, tell)
    assert len(events) == 1, "told once"


def test_a_loss_before_anything_was_captured_anew_finds_the_same_stages() -> None:
    story = lost_stage()
    story.facts = with_remains(story.facts, story.plan, LEFT, kept(15), COSTS)
    story.moves()
    again = replace(story.facts, approximation=None)
    facts = with_remains(again, story.plan, LEFT, kept(15), COSTS)
    assert facts.approximation is not None
    assert facts.approximation.lost == (1,)


def test_what_is_not_allowed_is_explained_and_not_done() -> None:
    story = lost_stage(Allowed.NOTHING)
    story.facts = with_remains(story.facts, story.plan, LEFT, kept(15), COSTS)
    assert story.moves()[-1] == "end"
    assert story.plan.stop is not None
    assert "the shards of seats [1] are lost" in story.plan.stop.reason
    assert "allow_approximate=True" in story.plan.stop.reason


def test_nonsense_of_an_agent_counts_as_nothing_kept() -> None:
    story = lost_stage()
    reports = {NodeId(2): {"kept": {"store": ["h"], "copies": [1]}}}
    facts = with_remains(story.facts, story.plan, LEFT, reports, COSTS)
    assert facts.approximation is not None
    assert facts.approximation.way is Option.CHECKFREE


def test_parity_that_is_on_its_way_is_waited_for() -> None:
    story = lost_stage().knows(awaited="step 40 is rebuilt from parity")
    assert with_remains(story.facts, story.plan, LEFT, {}, COSTS) == story.facts
    assert story.facts.members[MemberId(0)].allowed
