"""Agents let in who may drill, for that alone; over real sockets, with ranks that are written out."""

import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ftkit.core.errors import UsageError, WireError
from ftkit.core.ids import MemberId, NodeId, Seat
from ftkit.core.trace import read_run
from ftkit.core.wire import Line, connect
from ftkit.launch.agent import Agent
from ftkit.launch.config import JobConfig
from ftkit.launch.drill_access import drill_key, read_access, remove_access, write_access
from ftkit.launch.drill_visits import refusal
from ftkit.launch.programme.job_state import NodeState
from ftkit.recovery.facts import MemberFacts, Stage
from ftkit.recovery.plan import Mode
from tests.launch.programme.jobs import GENERATION, plan

SECRET = "5a" * 32
KEY = drill_key(bytes.fromhex(SECRET))
PLAN = plan()
ORDER = list(PLAN.order)


class Process:
    """A rank's process that takes down what it is sent."""

    def __init__(self, seat: int) -> None:
        self.seat, self.exit_code, self.gone = Seat(seat), None, False
        self.sent: list[signal.Signals] = []

    def signal(self, number: signal.Signals) -> None:
        self.sent.append(number)


class Node:
    """An agent on a thread of its own, with ranks 0 and 1 of `PLAN`."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        (folder / "run" / "events").mkdir(parents=True)
        self.config = JobConfig(
            job="j",
            command=("true",),
            run_dir=str(folder / "run"),
            shm_root=str(folder),
            preload=False,
            nproc=2,
            **settings,
        )
        self.agent = Agent(self.config, NodeId(0), SECRET, host="127.0.0.1", inherited={})
        self.ranks = {MemberId(n): Process(n) for n in range(2)}
        for member, process in self.ranks.items():
            self.agent._roster._processes[member] = process  # type: ignore[assignment]
            self.agent._roster.facts[member] = MemberFacts(
                member=member,
                seat=process.seat,
                node=NodeId(0),
                stage=Stage.ACTIVE,
                generation=GENERATION,
            )
        self.agent._plan = PLAN
        self._thread = threading.Thread(target=self.agent.run, name="agent")
        self._thread.start()

    def visit(self, key: bytes = KEY, *, visitor: bool = True) -> Line:
        line = connect(
            self.agent.address, key, hello={"role": "drill"}, timeout_s=5, visitor=visitor
        )
        line.answer_within(5)
        return line

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [e for e in read_run(Path(self.config.run_dir)) if e["kind"] == kind]

    def end(self) -> None:
        for process in self.ranks.values():
            process.gone = True
        self.agent.stop()
        self._thread.join(20)
        assert not self._thread.is_alive()


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path)
    yield made
    made.end()


def ask(line: Line, **message: Any) -> dict[str, Any]:
    line.send(message)
    return line.receive()


def test_a_node_says_how_it_stands(node: Node) -> None:
    line = node.visit()
    told = NodeState.from_json(ask(line, type="state", plan=True))
    assert (told.node, told.order, told.plan) == (0, PLAN.order, PLAN)
    assert [m.member for m in told.members] == [0, 1]
    assert (told.led, told.draining) == (False, False)
    assert "ftkit" in told.versions
    assert NodeState.from_json(ask(line, type="state", plan=False)).plan is None
    line.close()


@pytest.mark.parametrize(("fault", "number"), [("kill", signal.SIGKILL), ("stop", signal.SIGSTOP)])
def test_a_strike_falls_on_the_one_and_is_told_as_a_drill(node: Node, fault, number) -> None:
    line = node.visit()
    assert ask(line, type="strike", fault=fault, members=[1], order=ORDER) == {"type": "struck"}
    assert [p.sent for p in node.ranks.values()] == [[], [number]]
    (event,) = node.events("drill")
    assert (event["fault"], event["seat"], event["member"], event["live"]) == (fault, 1, 1, True)
    drilled = {m: f.drilled for m, f in node.agent._roster.facts.items()}
    assert drilled == {0: False, 1: True}
    assert not node.agent._roster._killed  # it was no act of ftkit's own
    if fault == "stop":
        assert ask(line, type="release", member=1)["type"] == "released"
        assert ask(line, type="release", member=0)["type"] == "released"
        assert ask(line, type="release", member=99)["type"] == "released"
        # Whom no drill has stopped, none wakes.
        assert [p.sent for p in node.ranks.values()] == [[], [number, signal.SIGCONT]]
    line.close()


def test_the_coordinator_hears_of_a_node_that_is_taken_before_it_is(
    node: Node, monkeypatch
) -> None:
    secret = bytes.fromhex(SECRET)
    hello = {"role": "coordinator", "term": 1}
    coordinator = connect(node.agent.address, secret, hello=hello, timeout_s=5)
    coordinator.answer_within(5)
    # Here it is this process that would be killed, and its ranks are written out.
    monkeypatch.setattr("ftkit.launch.drill_visits.os.kill", lambda pid, number: node.agent.stop())
    monkeypatch.setattr("ftkit.launch.drill_visits.shutil.rmtree", lambda *_, **__: None)
    told = coordinator.receive()
    assert [m["drilled"] for m in told["members"]] == [False, False]
    line = node.visit()
    assert (
        ask(line, type="strike", fault="lose-node", members=[0, 1], order=ORDER)["type"] == "struck"
    )
    while not all(m["drilled"] for m in told["members"]):
        told = coordinator.receive()
    assert told["ended"] is False
    line.close()
    coordinator.close()


def test_who_holds_the_key_can_be_no_coordinator(node: Node) -> None:
    line = node.visit()
    line.send({"type": "plan", "plan": replace(PLAN, version=99, mode=Mode.ENDED).to_json()})
    assert line.receive() == {"type": "refused", "reason": "unknown message 'plan'"}
    assert node.agent._plan == PLAN
    for key, visitor in ((KEY, False), (bytes.fromhex(SECRET), True), (b"x" * 32, True)):
        with pytest.raises(WireError):
            node.visit(key, visitor=visitor)
    line.close()


@pytest.mark.parametrize(
    "message",
    [
        {"type": "strike"},
        {"type": "strike", "fault": "kill", "members": None, "order": ORDER},
        {"type": "strike", "fault": "kill", "members": ["all"], "order": ORDER},
        {"type": "release", "member": {}},
        {"type": "state"},
        {},
    ],
)
def test_what_is_no_message_strikes_nobody(node: Node, message) -> None:
    line = node.visit()
    line.send(message)
    assert line.receive()["type"] == "refused"
    assert not any(p.sent for p in node.ranks.values())
    # And the agent goes on.
    assert ask(line, type="state", plan=False)["type"] == "state"
    line.close()


def test_notice_is_given_once(node: Node) -> None:
    line = node.visit()
    strike = {"type": "strike", "fault": "preempt", "members": [0, 1], "order": ORDER}
    assert ask(line, **strike)["type"] == "struck"
    assert node.agent._draining_since is not None
    assert "taken away" in ask(line, **strike)["reason"]
    assert len(node.events("drill")) == 2
    line.close()


def test_a_job_with_no_drills_lets_nobody_in(tmp_path: Path) -> None:
    node = Node(tmp_path, drills=False)
    try:
        with pytest.raises(WireError):
            node.visit()
        deadline = time.monotonic() + 10
        while not node.events("refused"):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        node.end()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"fault": "bit-flip"}, "there is no drill 'bit-flip'"),
        ({"order": [0, 6]}, "moved on"),
        ({"members": []}, "do not train on this node"),
        ({"members": [2]}, "do not train on this node"),
        ({"members": [0, 1]}, "strikes one rank, not 2"),
        ({"fault": "lose-node"}, "others train on this node"),
        ({"fault": "lose-node", "members": [0, 1]}, ""),
        ({}, ""),
    ],
)
def test_a_strike_is_refused_unless_the_job_is_what_was_looked_at(change, words) -> None:
    here = [MemberId(0), MemberId(1), MemberId(7)]  # 7 stands by
    message = {"fault": "kill", "members": [1], "order": ORDER} | change
    told = refusal(message, PLAN, here, draining=False)
    assert words in told
    assert bool(words) == bool(told)


def test_no_strike_while_the_job_is_not_running_or_the_node_is_leaving() -> None:
    message = {"fault": "kill", "members": [1], "order": ORDER}
    here = [MemberId(1)]
    assert "moved on" in refusal(message, replace(PLAN, mode=Mode.HALTING), here, draining=False)
    assert "moved on" in refusal(message, replace(PLAN, world=None), here, draining=False)
    assert "taken away" in refusal(message, PLAN, here, draining=True)


def test_the_key_is_left_for_this_user_alone_and_not_the_secret(tmp_path: Path) -> None:
    config = JobConfig(job="j", command=("true",), run_dir=str(tmp_path), nproc=2, parity="")
    write_access(config, "embedded", SECRET)
    path = tmp_path / "drill-access.json"
    assert path.stat().st_mode & 0o777 == 0o600
    assert SECRET not in path.read_text()
    access = read_access(tmp_path)
    assert (bytes.fromhex(access.key), access.seats) == (KEY, 2)
    remove_access(tmp_path)
    remove_access(tmp_path)
    with pytest.raises(UsageError, match="its job is over"):
        read_access(tmp_path)


def test_a_job_that_takes_no_drills_says_so(tmp_path: Path) -> None:
    config = JobConfig(job="j", command=("true",), run_dir=str(tmp_path), drills=False)
    write_access(config, "embedded", SECRET)
    with pytest.raises(UsageError, match="--no-drills"):
        read_access(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"v": 2}', '{"v": 1, "key": "zz"}'])
def test_a_file_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "drill-access.json").write_text(text)
    with pytest.raises(UsageError, match="cannot be used"):
        read_access(tmp_path)
