"""Faults of single ranks, at every point of a step: the job ends with the same bits."""

from pathlib import Path

import pytest

from ftkit.core.fault_plan import Kind, Point
from ftkit.launch.checker import Answer
from tests.drills.jobs import HERE, STEPS, TRAINING, Run, alive, fault, judge, run

pytestmark = pytest.mark.multiproc


def assert_pass(done: Run, reference: Run, *, seats: int = 3, evicts: bool = True) -> None:
    outcome = judge(done, reference, seats=seats, evicts=evicts)
    assert outcome.outcome is Answer.PASS, f"{outcome.evidence}\n{done.stop}\n{done.log}"
    assert outcome.params_equal
    assert outcome.samples_lost == outcome.samples_doubled == outcome.survivor_exits == 0


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (Point.DATA, Point.FORWARD),
        (Point.BACKWARD, Point.ALL_REDUCE),
        (Point.VOTE, Point.COMMIT),
        (Point.OPTIMIZER, Point.CAPTURE),
    ],
)
def test_a_rank_is_killed_and_then_rank_0(
    first: Point, second: Point, reference: Run, tmp_path: Path
) -> None:
    faults = [fault(Kind.KILL, first, 1, 5), fault(Kind.KILL, second, 0, 20)]
    done = run(tmp_path / "run", TRAINING, [str(STEPS)], nproc=3, faults=faults)
    assert len(done.of("drill")) == 2
    assert_pass(done, reference)


def test_a_rank_is_known_to_be_dead_before_its_memory_is_free(tmp_path: Path) -> None:
    done = run(tmp_path / "run", HERE / "heavy.py", nproc=1)
    assert done.stop.code == 0, f"{done.stop}\n{done.log}"
    (known,) = [e["mono"] for e in done.of("exit") if e["signal"] == 9]
    (freed,) = [e["mono"] for e in done.of("freed")]
    first, second = [e["mono"] for e in done.of("spawn")]
    assert first < known < freed < second, "its place is filled when it is gone"


def test_a_second_rank_is_killed_while_the_world_is_repaired(
    reference: Run, tmp_path: Path
) -> None:
    faults = [fault(Kind.KILL, Point.FORWARD, 1, 5), fault(Kind.KILL, Point.RECOVERY, 0, 5)]
    done = run(tmp_path / "run", TRAINING, [str(STEPS)], nproc=3, faults=faults)
    assert [d["phase"] for d in done.of("drill")] == ["forward", "recovery"]
    assert_pass(done, reference)


def test_two_of_three_are_killed_in_the_same_step(reference: Run, tmp_path: Path) -> None:
    faults = [fault(Kind.KILL, Point.ALL_REDUCE, seat, 8) for seat in (0, 2)]
    done = run(tmp_path / "run", TRAINING, [str(STEPS)], nproc=3, faults=faults)
    assert_pass(done, reference)


def test_a_rank_stops_and_later_another_raises(reference: Run, tmp_path: Path) -> None:
    faults = [fault(Kind.STOP, Point.ALL_REDUCE, 1, 5), fault(Kind.RAISE, Point.BACKWARD, 0, 30)]
    done = run(tmp_path / "run", TRAINING, [str(STEPS)], nproc=3, faults=faults, max_stall_s=5)
    stopped = [e["pid"] for e in done.of("spawn") if e["member"] == 1]
    assert_pass(done, reference)
    assert "a drill raised this" in done.log
    assert not alive(stopped[0]), "one that was stopped must not wake up later"
    assert [e["signal"] for e in done.of("exit") if e["member"] == 1] == [9]


def test_a_rank_hangs_with_a_beating_heart(reference: Run, tmp_path: Path) -> None:
    faults = [fault(Kind.HANG, Point.FORWARD, 1, 5)]
    done = run(tmp_path / "run", TRAINING, [str(STEPS)], faults=faults, max_stall_s=5)
    assert_pass(done, reference, seats=2)


def test_ranks_that_catch_exceptions_of_their_own_go_on_together(
    reference: Run, tmp_path: Path
) -> None:
    done = run(tmp_path / "run", TRAINING, ["160", "flaky"])
    assert done.stop.code == 0, done.log
    assert all(e["raised"] > 10 for e in done.of("final"))
    assert done.params == reference.params
    assert not [e for e in done.of("exit") if e["code"] != 0]
