"""Who is left of a sharded world stands still for a replacement, and no longer than was said."""

from types import SimpleNamespace
from typing import Any

from ftkit.core.ids import Generation, NodeId
from ftkit.launch.replacement_wait import ReplacementWait
from ftkit.recovery.costs import Costs
from ftkit.recovery.facts import Stage
from ftkit.recovery.plan import Mode
from ftkit.recovery.protocol import advance
from ftkit.recovery.waiting import OnLoss
from tests.recovery.stories import Story, training

QUICK = Costs(world=3).with_measured(step_s={3: 1.0}, respawn_s=2.0, grow_s=20.0)


class Loss:
    """A job of three shards of which seat 0 has died and the others have given up theirs."""

    def __init__(self, wish: OnLoss = OnLoss.AUTO, costs: Costs = QUICK) -> None:
        self.story = lost()
        self.waits, self.known = ReplacementWait(wish), SimpleNamespace(costs=costs)
        self.told: list[tuple[str, str]] = []

    def at(self, now: float) -> list[str]:
        known: Any = self.known
        wait, decided = self.waits.look(self.story.plan, self.story.facts, known, now)
        self.told += [(d.action, d.reason) for d in decided]
        self.story.knows(wait=wait)
        self.story.plan, moved = advance(self.story.plan, self.story.facts, self.story.budget)
        return [d.action for d in moved]

    def comes(self) -> None:
        self.story.says(
            3, Stage.READY, seat=0, generation=Generation(1), stepping=True, sharded=True
        )


def lost() -> Story:
    story = training(9)
    story.all_say(Stage.ACTIVE, sharded=True).knows(snapshots=frozenset({8}), world_max=3)
    story.says(0, Stage.DEAD, exit_code=-9)
    story.plan, _ = advance(story.plan, story.facts, story.budget)
    for member in (1, 2):
        story.says(member, Stage.READY, generation=Generation(1))
    story.plan, _ = advance(story.plan, story.facts, story.budget)
    assert story.plan.mode is Mode.FORMING
    return story


def test_they_wait_and_go_on_together() -> None:
    loss = Loss()
    assert loss.at(10.0) == []
    assert [action for action, _ in loss.told] == ["wait"]
    assert loss.at(11.0) == []
    loss.comes()
    assert loss.at(12.0) == ["form"]
    assert sorted(loss.story.world) == [1, 2, 3]
    assert len(loss.told) == 1, "said once"


def test_they_wait_no_longer_than_three_times_what_it_took_so_far() -> None:
    loss = Loss()
    assert loss.at(10.0) == []
    assert loss.at(16.9) == []
    assert loss.at(17.1) == ["form"]
    assert loss.story.world == [1, 2]
    assert [action for action, _ in loss.told] == ["wait", "go-on"]
    assert "not there after 7.1 s" in loss.told[-1][1]


def test_where_to_wait_is_dearer_they_go_on_at_once() -> None:
    loss = Loss(costs=QUICK.with_measured(respawn_s=500.0))
    assert loss.at(10.0) == ["form"]
    assert loss.story.world == [1, 2]
    assert [action for action, _ in loss.told] == ["go-on"]


def test_a_second_loss_is_judged_anew_and_waited_for_no_longer() -> None:
    loss = Loss()
    assert loss.at(10.0) == []
    loss.story.says(1, Stage.DEAD, exit_code=-9)
    assert "form" not in loss.at(14.0)
    assert [action for action, _ in loss.told] == ["wait", "wait"]
    assert loss.at(17.1) == ["form"]
    assert loss.story.world == [2]


def test_who_stands_by_is_taken_and_nobody_decides() -> None:
    loss = Loss()
    loss.comes()
    assert loss.at(10.0) == ["form"]
    assert sorted(loss.story.world) == [1, 2, 3]
    assert loss.told == []


def test_nobody_waits_for_a_node_unless_told_to() -> None:
    loss = Loss()
    loss.story.knows(nodes_away=frozenset({NodeId(0)}))
    loss.at(10.0)
    assert loss.told[0][0] == "go-on"
    forced = Loss(OnLoss.WAIT)
    forced.story.knows(nodes_away=frozenset({NodeId(0)}))
    assert forced.at(10.0) == []
    assert forced.at(1e6) == []


def test_a_new_coordinator_has_them_go_on() -> None:
    loss = Loss()
    assert loss.at(10.0) == []
    loss.waits, loss.known = ReplacementWait(), SimpleNamespace(costs=Costs(world=3))
    assert loss.at(10.1) == ["form"]
    assert "not measured yet" in loss.told[-1][1]
