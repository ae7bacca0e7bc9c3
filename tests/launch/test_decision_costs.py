"""Each decision between ways carries its table of costs, and says what was done."""

from typing import Any

import pytest

from ftkit.core.ids import Generation, NodeId, Step
from ftkit.detection.signals import NodeScored
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
    assert costs["table"][0]["option"] == "respawn"
    (wait,) = [row for row in costs["table"] if row["option"] == "wait"]
    assert "let in by those who train" in wait["barred"], "every rank holds the whole state"
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


def test_how_long_a_newcomer_takes_and_what_letting_it_in_costs() -> None:
    told = Told(training(step=5))
    now = 0.0
    for step in range(6, 20):
        now += 0.5
        told.story.all_say(Stage.ACTIVE, generation=Generation(1), at_step=Step(step))
        told.at(now)
    told.story.says(0, Stage.DEAD, exit_code=-9)
    told.at(now)
    for m in (1, 2):
        told.story.says(m, Stage.HALTED, generation=Generation(1), step=Step(18), voted=False)
    told.at(now + 0.2)
    for m in (1, 2):
        told.story.says(m, Stage.ACTIVE, generation=Generation(2), at_step=Step(19))
    told.story.says(3, Stage.STARTING, seat=0)
    told.at(now + 1.0)
    told.story.says(3, Stage.LINKED, linked=Generation(2), stepping=True)
    told.at(now + 4.0)
    assert told.costs.costs.respawn_s == pytest.approx(4.0)
    for m in (1, 2):
        told.story.says(m, Stage.ACTIVE, at_step=Step(20))
    told.at(now + 4.5)
    for m in (1, 2, 3):
        told.story.says(m, Stage.ACTIVE, generation=Generation(3), step=Step(20), at_step=Step(21))
    told.at(now + 7.0)  # "grown"
    told.at(now + 7.0)
    # One step of it is a step; for the rest everybody stood still.
    assert told.costs.costs.grow_s == pytest.approx(2.5 - 0.5)


def test_what_the_history_says_is_where_the_rate_begins() -> None:
    costs = DecisionCosts(8, ranks=4)
    scored = {
        "name": "a", "at": 0.0, "recent": 1.0, "fleet_per_day": 0.1, "factor": 10.0,
        "certainty": 0.0, "offender": False,
    }  # fmt: skip
    blank = costs.rate.per_s
    costs.believe(NodeScored(node=NodeId(0), faults=0, rate_per_day=0.001, **scored))  # type: ignore[arg-type]
    assert costs.rate.per_s == blank, "no fault is no news of a short history"
    costs.believe(NodeScored(node=NodeId(1), faults=9, rate_per_day=1.999, **scored))  # type: ignore[arg-type]
    # One a day on a node of four.
    assert costs.rate.mtbf_s(8) == pytest.approx(86_400 / 2)
    costs.believe(NodeScored(node=NodeId(1), faults=10, rate_per_day=9.0, **scored))  # type: ignore[arg-type]
    assert costs.rate.mtbf_s(8) == pytest.approx(86_400 / 2), "what happens in the job counts once"


def test_losses_that_only_the_disk_answers_make_saves_more_frequent() -> None:
    told = Told(training(step=9, nodes=1))
    assert told.costs.saving.beyond_parity == pytest.approx(0.01)
    assert DecisionCosts(3, parity=False).saving.beyond_parity == pytest.approx(0.1)
    for m in range(3):
        told.story.says(m, Stage.DEAD, exit_code=-9)
    told.at(1.0)
    for m, seat in ((3, 0), (4, 1), (5, 2)):
        told.story.says(m, Stage.READY, seat=seat, generation=Generation(1))
    assert "form" in told.at(2.0, written=Step(4))
    assert told.costs.saving.beyond_parity > 0.02
