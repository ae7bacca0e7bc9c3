"""Sharded jobs lose ranks: the others go on in their processes, and the bits stay the same."""

from pathlib import Path

import pytest

from ftkit.core import exit_codes
from ftkit.core.fault_plan import Kind, Point
from ftkit.core.ids import NodeId
from ftkit.launch.checker import Answer, Expectation, check
from ftkit.launch.engine import Engine
from ftkit.recovery.protocol import SHARDS_BACK
from tests.drills.jobs import HERE, Run, fault, run
from tests.drills.sharded import LATE, SLOT_SIZE, SLOTS, STEPS

pytestmark = pytest.mark.multiproc

JOB = HERE / "sharded.py"
LONG = 120


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same job on one rank, undisturbed."""
    done = run(tmp_path_factory.mktemp("sharded") / "reference", JOB, nproc=1)
    assert done.stop.code == 0, done.log
    assert len(done.params) == 1
    return done


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same for more steps."""
    folder = tmp_path_factory.mktemp("sharded") / "long"
    done = run(folder, JOB, ["0", str(LONG)], nproc=1)
    assert done.stop.code == 0, done.log
    return done


def assert_pass(done: Run, reference: Run, *, seats: int) -> None:
    expected = Expectation(
        fault="drill", phase="any", seed=0, world_size=seats, steps=STEPS, slots=SLOTS,
        slot_size=SLOT_SIZE, steps_back=SHARDS_BACK,
    )  # fmt: skip
    outcome = check(done.events, reference.events, expected)
    assert outcome.outcome is Answer.PASS, f"{outcome.evidence}\n{done.stop}\n{done.log}"
    assert outcome.params_equal
    assert outcome.steps_lost == outcome.samples_lost == outcome.samples_doubled == 0


def worlds(done: Run) -> list[int]:
    actions = ("form", "grown")
    return [len(e["members"]) for e in done.of("decision") if e["action"] in actions]


def test_four_three_two_four(whole: Run, tmp_path: Path) -> None:
    """One dies in backward, the next as it enters the world without the first."""
    faults = [fault(Kind.KILL, Point.BACKWARD, 1, 5), fault(Kind.KILL, Point.RECOVERY, 3, 5)]
    late = {"env": {LATE: "1.0"}}  # or the first is back before the second is lost
    done = run(tmp_path / "run", JOB, nproc=4, faults=faults, settings=late)
    assert_pass(done, whole, seats=4)
    assert {e["seat"] for e in done.of("exit") if e["signal"] == 9} == {1, 3}, "both were lost"
    assert worlds(done)[:3] == [4, 3, 2]
    assert worlds(done)[-1] == 4
    survivors = {e["member"] for e in done.of("build") if e["generation"] == 1} - {1, 3}
    assert survivors <= {e["member"] for e in done.of("final")}, "they never left their processes"


def test_a_rank_of_two_copies_is_lost(whole: Run, tmp_path: Path) -> None:
    """HSDP: two copies of two shards, then one copy of three, then two of two again."""
    faults = [fault(Kind.KILL, Point.OPTIMIZER, 0, 6)]
    done = run(tmp_path / "run", JOB, ["2"], nproc=4, faults=faults)
    assert_pass(done, whole, seats=4)


def test_a_survivor_whose_build_raises_is_replaced(whole: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "fail-0").touch()
    done = run(folder, JOB, nproc=3, faults=[fault(Kind.KILL, Point.FORWARD, 2, 6)])
    assert done.stop.code == 0, f"{done.stop}\n{done.log}"
    assert "of the script's own" in done.log
    assert done.params == whole.params


@pytest.mark.parametrize("shards", ["0", "2"])
def test_a_node_is_lost_with_its_shards(long: Run, tmp_path: Path, shards: str) -> None:
    """FSDP2, where parity has them; HSDP, where another copy has."""
    lose = Loser(tmp_path / "run" / "events", node=2)
    more = {"parity": "3+1"} if shards == "0" else {}
    done = run(
        tmp_path / "run", JOB, [shards, str(LONG)], nproc=1, nodes=4, on_poll=lose, settings=more
    )
    assert lose.struck
    assert done.stop.code == 0, f"{done.stop}\n{done.log}"
    assert done.params == long.params
    losses = {(e["step"], e["loss"]) for e in done.of("commit")}
    assert {step for step, _ in losses} == set(range(1, LONG + 1)), "every step, and none lost"


def test_the_only_copy_of_a_shard_is_lost(tmp_path: Path) -> None:
    """A node goes with its memory, and nothing else has its shards: said, not passed over."""
    lose = Loser(tmp_path / "run" / "events", node=2)
    done = run(tmp_path / "run", JOB, ["0", "4000"], nproc=1, nodes=3, on_poll=lose)
    assert done.stop.code == exit_codes.UNRECOVERABLE, f"{done.stop}\n{done.log}"
    assert "--parity" in done.stop.reason


class Loser:
    """Takes a node away, once, after it has committed some steps."""

    def __init__(self, events: Path, node: int) -> None:
        self._events, self._node = events, node
        self.struck = False

    def __call__(self, engine: Engine) -> None:
        if self.struck:
            return
        told = [p.read_text() for p in self._events.glob(f"seat-{self._node}*")]
        if sum(t.count('"kind":"commit"') for t in told) > 10:
            self.struck = True
            engine.kill_node(NodeId(self._node))
