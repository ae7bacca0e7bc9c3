"""Each decision between ways carries its table of costs, and says what was done."""

from typing import Any

import pytest

from ftkit.core.ids import Generation, NodeId, Step
from ftkit.launch.decision_costs import DecisionCosts
from ftkit.recovery.facts import Stage
from ftkit.recovery.protocol import Decision, advance
from tests.recovery.stories import Story, newcomer, training


class Told:
    """A story whose decisions are explained, at times that the test gives."""

    def __init__(self, story: Story) -> None:
        self.story, self.costs = story, DecisionCosts(len(story.plan.seats))

    def at(self, now: float, **known: Any) -> dict[str, Decision]:
        before = self.story.plan
        self.costs.look(before, self.story.facts, now)
        after, decisions = advance(before, self.story.facts, self.story.budget)
        self.story.plan = after
        told = self.costs.explain(before, after, self.story.facts, decisions, now=now, **known)
        return {d.action: d for d in told}


def table(decision: Decision) -> dict[str, Any]:
    told = decision.fields["costs"]
    assert isinstance(told, dict)
    return told


def test_a_respawn_shows_what_every_other_way_would_cost() -> None:
    told = Told(training())
    told.story.says(0, Stage.DEAD, exit_code=-9)
    told.story.says(1, Stage.HALTED).says(2, Stage.HALTED)
    costs = table(told.at(10.0)["respawn"])
    assert costs["taken"] == costs["option"] == "respawn"
    assert [row["option"] for row in costs["table"][:2]] == ["respawn", "wait"]
    assert {"option": "disk", "barred": "there is no checkpoint"} in costs["table"]
    assert costs["measured"] == []


def test_steps_and_repairs_are_measured_as_the_job_runs() -> None:
    told = Told(training(step=5))
    now = 0.0
    # The first three warm up; a look that sees no new step loses no time.
    for step, took in [(6, 9.0), (7, 9.0), (8, 9.0), (9, 9.0), (11, 1.0), (11, 0.4), (14, 1.1)]:
        now += took
        told.story.all_say(Stage.ACTIVE, generation=Generation(1), at_step=Step(step))
        told.at(now)
    assert told.costs.costs.step_s == {3: pytest.approx(2.5 / 5)}
    told.story.says(0, Stage.DEAD, exit_code=-9)
    told.at(now + 1)
    for m in (1, 2):
        told.story.says(m, Stage.HALTED, voted=False)
    assert table(told.at(now + 1.4)["resume"])["measured"] == ["regroup_s", "step_s"]
    assert told.costs.costs.regroup_s == pytest.approx(0.4)


def test_growth_is_explained_by_what_it_brings() -> None:
    story = newcomer()
    told = Told(story)
    story.plan = story.plan.revised(joining=None)
    costs = table(told.at(1.0)["join"])
    assert costs["grow"] is True
    assert costs["gain_s"] > costs["cost_s"]
    assert costs["reason"].startswith("growing from 2 to 3 ranks saves")


def test_with_nobody_left_the_tier_that_is_taken_is_named() -> None:
    told = Told(training(step=9))
    for m in range(3):
        told.story.says(m, Stage.DEAD, exit_code=-9)
    arena = frozenset({Step(8)})
    assert table(told.at(1.0, arena=arena)["reform"])["taken"] == "restart-memory"


def test_a_checkpoint_is_what_is_left_when_a_node_goes_with_everybody() -> None:
    told = Told(training(step=9, nodes=1))
    for m in range(3):
        told.story.says(m, Stage.DEAD, exit_code=None)
    told.story.knows(nodes_lost=frozenset({NodeId(0)}))
    costs = table(told.at(1.0, written=Step(4))["reform"])
    assert costs["taken"] == costs["option"] == "disk"
    (row,) = [r for r in costs["table"] if r["option"] == "disk"]
    assert row["terms"]["recompute"] == pytest.approx(5.5)
    assert row["terms"]["idle"] == 600


def test_a_world_that_breaks_without_a_loss_has_no_table() -> None:
    told = Told(training())
    told.story.all_say(Stage.HALTED, voted=False)
    assert "costs" not in told.at(1.0)["resume"].fields
