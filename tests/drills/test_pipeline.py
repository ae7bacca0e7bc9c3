"""A pipeline loses a stage: the others take its layers, and the bits stay the same."""

from pathlib import Path

import pytest

from ftkit.core.fault_plan import Kind, PlannedFault, Point
from ftkit.launch.checker import Answer, Expectation, check
from ftkit.launch.member_drills import judge_stage_lost
from ftkit.recovery.protocol import SHARDS_BACK
from tests.drills.jobs import Run, fault, run

pytestmark = pytest.mark.multiproc

EXAMPLE = Path(__file__).parents[2] / "examples" / "pipeline_1f1b.py"
STEPS, SEATS = 30, 3


def test_a_stage_is_lost_and_comes_back(tmp_path: Path) -> None:
    arguments = ["--steps", str(STEPS)]
    whole = run(tmp_path / "reference", EXAMPLE, arguments, nproc=1)
    assert whole.stop.code == 0, whole.log
    done = run(
        tmp_path / "run",
        EXAMPLE,
        arguments,
        nproc=SEATS,
        faults=[fault(Kind.KILL, Point.FORWARD, 1, 5)],
    )
    expected = Expectation(
        fault="stage-lost", phase="any", seed=0, world_size=SEATS, steps=STEPS, slots=8,
        slot_size=2, steps_back=SHARDS_BACK,
    )  # fmt: skip
    outcome = judge_stage_lost(check(done.events, whole.events, expected), done.events, SEATS)
    assert outcome.outcome is Answer.PASS, f"{outcome.evidence}\n{done.stop}\n{done.log}"
    assert outcome.params_equal
    assert outcome.samples_lost == outcome.samples_doubled == outcome.survivor_exits == 0
    assert {len(e["bounds"]) for e in done.of("cut")} == {SEATS + 1, SEATS}


MOVING = Path(__file__).parent / "pipeline.py"
#: Milliseconds a slot of each layer: the first stage has nearly all of them.
UNEVEN, EVEN = "6,6,6,1,0,0,0,0", "0,0,0,0,0,0,0,0"
MOVE_STEPS = 40


@pytest.fixture(scope="module")
def still(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same job on one rank."""
    folder = tmp_path_factory.mktemp("pipeline") / "reference"
    done = run(folder, MOVING, [str(MOVE_STEPS), EVEN], nproc=1)
    assert done.stop.code == 0, done.log
    return done


def test_layers_move_while_it_trains(still: Run, tmp_path: Path) -> None:
    done = run(tmp_path / "run", MOVING, [str(MOVE_STEPS), UNEVEN], nproc=2)
    assert done.stop.code == 0, f"{done.stop}\n{done.log}"
    assert done.params == still.params
    moves = [e for e in done.of("recut") if e["before"] == [0, 4, 8]]
    assert {e["seat"] for e in moves} == {0, 1}, done.log
    (into,) = [e for e in moves if e["seat"] == 1]
    assert 1 <= into["bounds"][1] < 4, "the first stage has fewer of the slow layers"
    assert into["layers"] == list(range(into["bounds"][1], 4))
    assert into["late_bytes"] == 0, "all of it came while steps went on"
    assert into["unproved"] == []
    assert into["overlapped"] >= 1
    assert into["bulk_bytes"] > 2 * into["gradient_bytes"] / into["overlapped"] > 0
    assert not done.of("rollback")
    assert {e["generation"] for e in done.of("commit")} == {1}, "the same world all along"


def test_a_pipeline_that_swaps_its_outer_stages_has_the_same_bits_on_any_cut(
    tmp_path: Path,
) -> None:
    arguments = ["16", EVEN, "swapped"]
    whole = run(tmp_path / "reference", MOVING, arguments, nproc=4)
    lost = fault(Kind.KILL, Point.FORWARD, 0, 5)
    done = run(tmp_path / "run", MOVING, arguments, nproc=4, faults=[lost])
    assert whole.stop.code == done.stop.code == 0, f"{whole.log}\n{done.log}"
    assert 4 in {len(e["bounds"]) for e in done.of("cut")}, "three went on"
    assert not done.of("approximate"), "its shards were in memory"
    assert done.params == whole.params


@pytest.mark.parametrize(
    ("kind", "stage", "seat"),
    [(Kind.KILL, 1, 0), (Kind.STOP, 3, 1)],
    ids=["owner while it sends", "target stopped at the switch"],
)
def test_a_rank_is_lost_while_layers_move(
    still: Run, tmp_path: Path, kind: Kind, stage: int, seat: int
) -> None:
    struck = PlannedFault(
        kind=kind, point=Point.MIGRATION, seat=seat, member=seat, step=1, bucket=stage
    )
    done = run(
        tmp_path / "run",
        MOVING,
        [str(MOVE_STEPS), UNEVEN],
        nproc=2,
        faults=[struck],
        max_stall_s=4.0,
    )
    assert done.stop.code == 0, f"{done.stop}\n{done.log}"
    assert done.of("recut-begins")
    assert [e["seat"] for e in done.of("exit") if e["signal"] == 9] == [seat]
    assert done.params == still.params
    steps = [e["step"] for e in done.of("commit") if e["seat"] == 1 - seat]
    assert set(steps) == set(range(1, MOVE_STEPS + 1))
    assert len(steps) <= MOVE_STEPS + SHARDS_BACK
