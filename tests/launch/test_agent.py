"""The agent between coordinators: what it has measured is kept, and metrics go on."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ftkit.core.errors import WireError
from ftkit.core.ids import Generation, MemberId, NodeId, Seat
from ftkit.core.world import Member, World
from ftkit.detection.signals import NodeGap, to_json
from ftkit.launch.agent import STANDS_BY, Agent
from ftkit.launch.config import JobConfig
from ftkit.recovery.facts import Stage
from ftkit.recovery.plan import Mode, Plan

GAP = to_json(NodeGap(node=NodeId(0), at=1.0, gap_s=3.0))


class Connection:
    """What the agent sends to, broken or not."""

    def __init__(self, *, broken: bool) -> None:
        self.broken, self.told = broken, list[dict[str, Any]]()

    def send(self, message: dict[str, Any]) -> None:
        if self.broken:
            raise WireError("it hung up")
        self.told.append(message)

    def close(self) -> None:
        """Nothing to close."""


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    config = JobConfig(
        job="j",
        command=("true",),
        run_dir=str(tmp_path / "run"),
        shm_root=str(tmp_path),
        preload=False,
    )
    (tmp_path / "run" / "events").mkdir(parents=True)
    made = Agent(config, NodeId(0), "00" * 16, host="127.0.0.1", inherited={})
    yield made
    made.close()


def test_what_could_not_be_told_is_told_to_the_next_coordinator(agent) -> None:
    broken, sound = Connection(broken=True), Connection(broken=False)
    agent._coordinator_connected(1, broken)
    agent._handle("signal", GAP)
    agent._tell_coordinator()
    agent._coordinator_connected(2, sound)
    agent._tell_coordinator()
    agent._tell_coordinator()
    assert [message["signals"] for message in sound.told] == [[GAP], []]


def test_all_that_came_in_meanwhile_makes_one_report(agent) -> None:
    sound = Connection(broken=False)
    agent._put("coordinator", (1, sound))
    for _ in range(3):
        agent._put("signal", GAP)
    agent._put("stop", None)
    agent.run()
    assert [message["signals"] for message in sound.told] == [[GAP] * 3]


def test_metrics_go_on_while_no_coordinator_is_connected(agent, monkeypatch) -> None:
    step = {"seat": 0, "waited_s": 0.1, "gc_s": 0.0, "seconds": {}, "loss": None, "grad_norm": None}
    monkeypatch.setattr(agent._arenas, "steps", lambda alive: [step])
    agent._tell_coordinator()
    assert "ftkit_rank_steps_total" in agent.metrics.render()


def test_steps_are_read_at_every_tick_though_reports_are_far_apart(agent, monkeypatch) -> None:
    sound, left = Connection(broken=False), [[GAP], [GAP, GAP], []]
    agent._coordinator_connected(1, sound)
    monkeypatch.setattr(agent._arenas, "steps", lambda alive: left.pop(0))
    monkeypatch.setattr(agent.metrics, "take_steps", lambda steps: None)
    agent._gather(1.0)  # the ring of a rank holds the last steps alone
    agent._gather(1.5)
    agent._tell_coordinator()
    assert [message["signals"] for message in sound.told] == [[GAP] * 3]


def unused() -> Plan:
    """A plan by which the job goes on without any rank of this node."""
    there = Member(member=MemberId(9), seat=Seat(1), node=NodeId(1), host="h", port=1)
    return Plan(mode=Mode.RUNNING, world=World.of(Generation(3), [there]))


def test_only_spares_of_a_node_that_goes_are_killed_and_only_while_nobody_may_need_them(
    agent, monkeypatch
) -> None:
    killed: list[object] = []
    monkeypatch.setattr(agent._roster, "kill", killed.append)
    monkeypatch.setattr(type(agent._roster), "all_ended", False)
    agent._draining_since = 100.0
    agent._plan = unused()
    agent._end_if_drained(100.5)
    agent._plan = replace(agent._plan, mode=Mode.HALTING)  # the next world may be of them
    agent._end_if_drained(102.0)
    agent._plan = unused()
    agent._end_if_drained(102.5)
    assert killed == []
    agent._end_if_drained(103.6)
    assert killed == [STANDS_BY]
    assert Stage.ACTIVE not in STANDS_BY, "who was in the world leaves by itself"


@pytest.mark.parametrize("sent", [None, "soon", [1.0], 10**400])
def test_a_clock_question_that_is_none_is_passed_over(agent, sent) -> None:
    agent._handle("plan", (1, {"type": "clock", "sent": sent}))
    assert agent._stamps is None
