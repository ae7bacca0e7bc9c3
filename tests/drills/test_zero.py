"""Jobs whose optimizer state is cut over the ranks: who is left owns what is lost, and reads nothing."""

import os
import signal
from pathlib import Path

import pytest

from ftkit.core.fault_plan import Kind, Point
from ftkit.core.ids import NodeId
from ftkit.core.process_stat import all_stopped
from ftkit.core.trace import read_run
from ftkit.launch.checker import Answer, Expectation, check
from ftkit.launch.engine import Engine
from tests.drills.jobs import HERE, Run, fault, run
from tests.drills.sharded import LATE, SLOT_SIZE, SLOTS, STEPS
from tests.drills.zero import PAUSE

pytestmark = pytest.mark.multiproc

JOB = HERE / "zero.py"

#: Moments of every element of every parameter, told by whoever holds them.
State = dict[tuple[int, str, int], set[str]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same job on one rank, undisturbed."""
    done = run(tmp_path_factory.mktemp("zero") / "reference", JOB, nproc=1)
    assert done.stop.code == 0, done.log
    assert len(done.params) == 1
    return done


def state(done: Run) -> State:
    found = State()
    for event in done.of("state"):
        for parameter, key, row, told in event["rows"]:
            found.setdefault((parameter, key, row), set()).add(told)
    return found


def assert_same(done: Run, reference: Run) -> None:
    """Parameters and state are the undisturbed run's, bit for bit, on whoever holds them."""
    assert done.stop.code == 0, f"{done.stop}\n{done.log}"
    assert done.params == reference.params
    assert state(done) == state(reference)


def test_four_three_two_four(whole: Run, tmp_path: Path) -> None:
    """One dies in backward, one as rows are handed round; twice nothing is read, and none lost."""
    faults = [fault(Kind.KILL, Point.BACKWARD, 1, 5), fault(Kind.KILL, Point.OPTIMIZER, 3, 14)]
    late = {"env": {LATE: "2.5"}}  # or the first is back before the second is lost
    done = run(tmp_path / "run", JOB, nproc=4, faults=faults, settings=late)
    outcome = check(
        done.events,
        whole.events,
        Expectation(
            fault="drill", phase="any", seed=0, world_size=4, steps=STEPS, slots=SLOTS,
            slot_size=SLOT_SIZE,
        ),
    )  # fmt: skip
    # Survivors may stand still before anybody gives the order, which is then in no event.
    assert outcome.outcome is not Answer.FAIL, f"{outcome.evidence}\n{done.stop}\n{done.log}"
    assert outcome.steps_lost == outcome.samples_lost == outcome.samples_doubled == 0
    assert_same(done, whole)
    assert {e["seat"] for e in done.of("exit") if e["signal"] == 9} == {1, 3}
    sizes = [len(e["members"]) for e in done.of("decision") if e["action"] in ("resume", "grown")]
    assert sizes[:2] == [3, 2]
    assert sizes[-1] == 4
    taken = done.of("promote")
    assert sum(e["blocks"] for e in taken if e["generation"] == 2) == 3, "a third of its state each"
    assert sum(e["blocks"] for e in taken if e["generation"] == 3) >= 4
    assert {e["moved"] for e in taken} == {0}
    assert all(e["bytes"] for e in taken)
    assert not {e["member"] for e in done.of("restore")} & {0, 1, 2, 3}, "newcomers alone load"
    assert not done.of("blocks-lost")
    # Beside training, every block got a stand-in again before the second was lost.
    lost_at = max(e["mono"] for e in done.of("drill"))
    assert [e for e in done.of("replicated") if e["mono"] < lost_at and e["bytes"]]


def test_a_block_and_its_stand_in_are_lost_together(whole: Run, tmp_path: Path) -> None:
    """Any two of four share blocks: all begin from the arenas, which outlive their processes."""
    kill = Killer(tmp_path / "run", [1, 2])
    done = run(tmp_path / "run", JOB, nproc=4, on_poll=kill, settings={"env": {PAUSE: "0.05"}})
    assert kill.struck
    assert_same(done, whole)
    assert {e["seat"] for e in done.of("exit") if e["signal"] == 9} == {1, 2}
    assert {e["seat"] for e in done.of("blocks-lost")} == {0, 3}
    assert {e["seat"] for e in done.of("restore")} == {0, 1, 2, 3}


def test_a_node_is_lost_with_its_memory_and_nothing_is_read(whole: Run, tmp_path: Path) -> None:
    lose = Loser(tmp_path / "run" / "events", [2])
    done = run(tmp_path / "run", JOB, nproc=1, nodes=4, on_poll=lose)
    assert lose.struck
    assert_same(done, whole)
    assert sum(e["blocks"] for e in done.of("promote")) == 3
    assert {e["moved"] for e in done.of("promote")} == {0}
    assert not {e["member"] for e in done.of("restore")} & {0, 1, 3}


def test_two_nodes_are_lost_with_their_memory(whole: Run, tmp_path: Path) -> None:
    """What nobody holds, and no arena has, comes from parity."""
    lose = Loser(tmp_path / "run" / "events", [1, 2], after="parity")
    more = {"parity": "2+2", "env": {PAUSE: "0.05"}}
    done = run(tmp_path / "run", JOB, nproc=1, nodes=4, on_poll=lose, settings=more)
    assert lose.struck
    assert_same(done, whole)
    assert done.of("blocks-lost")
    assert {e["seat"] for e in done.of("restore")} == {0, 1, 2, 3}


def test_all_nodes_are_lost_with_their_memory(whole: Run, tmp_path: Path) -> None:
    """Nothing is left but the disk: in new processes all begin from its newest whole step."""
    lose = Loser(tmp_path / "run" / "events", [0, 1], after="checkpoint")
    disk = tmp_path / "disk"
    more = {"checkpoint_dir": str(disk), "checkpoint_every": 4, "env": {PAUSE: "0.1"}}
    done = run(tmp_path / "run", JOB, nproc=1, nodes=2, on_poll=lose, settings=more)
    assert lose.struck
    assert_same(done, whole)
    loads = [e for e in done.of("restore") if e["source"] == str(disk)]
    assert {e["seat"] for e in loads} == {0, 1}
    (step,) = {e["step"] for e in loads}
    assert step % 4 == 0
    assert step in {e["step"] for e in done.of("checkpoint")}
    assert not done.of("promote"), "nobody was left to take over"


class Killer:
    """Kills two ranks together, once, after some steps: neither is there to take over from the other."""

    def __init__(self, folder: Path, seats: list[int]) -> None:
        self._folder, self._seats = folder, seats
        self.struck = False

    def __call__(self, engine: Engine) -> None:
        if self.struck:
            return
        events = read_run(self._folder)
        if sum(e["kind"] == "commit" and e["seat"] == self._seats[0] for e in events) <= 7:
            return
        pids = [e["pid"] for e in events if e["kind"] == "spawn" and e["seat"] in self._seats]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        self.struck = all(all_stopped(pid) for pid in pids)
        for pid in pids if self.struck else ():
            os.kill(pid, signal.SIGKILL)


class Loser:
    """Takes nodes away, once, after the first has committed some steps, and `after` has come."""

    def __init__(self, events: Path, nodes: list[int], after: str = "commit") -> None:
        self._events, self._nodes, self._after = events, nodes, f'"kind":"{after}"'
        self.struck = False

    def __call__(self, engine: Engine) -> None:
        if self.struck:
            return
        told = [p.read_text() for p in self._events.glob(f"seat-{self._nodes[0]}*")]
        come = any(self._after in p.read_text() for p in self._events.glob("*.jsonl"))
        if come and sum(t.count('"kind":"commit"') for t in told) > 10:
            self.struck = True
            for node in self._nodes:
                engine.kill_node(NodeId(node))
