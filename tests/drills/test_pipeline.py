"""A pipeline loses a stage: the others take its layers, and the bits stay the same."""

from pathlib import Path

import pytest

from ftkit.core.fault_plan import Kind, Point
from ftkit.launch.checker import Answer, Expectation, check
from ftkit.launch.member_drills import judge_stage_lost
from ftkit.recovery.protocol import SHARDS_BACK
from tests.drills.jobs import fault, run

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
