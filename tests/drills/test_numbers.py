"""Wrong numbers on real ranks: whose they are is said, and the job ends with the same bits."""

import json
from pathlib import Path
from typing import Any

import pytest

from ftkit.core.corruption_plan import PlannedCorruption, Target, to_environ
from tests.drills.jobs import STEPS, TRAINING, Run, run

pytestmark = pytest.mark.multiproc


def wrong(target: Target, seat: int, step: int, **more: Any) -> PlannedCorruption:
    return PlannedCorruption(target=target, seat=seat, member=seat, step=step, **more)


def settings(*plan: PlannedCorruption, **options: object) -> dict[str, Any]:
    told = {"TRAINING_OPTIONS": json.dumps({"verify_every": 1, **options})}
    return {"env": {**to_environ(plan), **told}}


def verdicts(done: Run) -> list[tuple[str, int, str]]:
    """Of numbers: what is said of a busy machine depends on the machine."""
    return [
        (e["fault"], e["seat"], e["evidence"].get("kind", ""))
        for e in done.of("verdict")
        if e["fault"] in ("sdc", "numeric")
    ]


def test_flipped_bits_and_a_passing_nan_leave_no_trace(reference: Run, tmp_path: Path) -> None:
    plan = (
        wrong(Target.WEIGHT, 1, 5, bit=0, place=0.3),
        wrong(Target.OPTIMIZER, 2, 12, bit=22, place=0.6),
        wrong(Target.GRADIENT, 0, 20, bit=30, place=0.1),
        wrong(Target.WEIGHT, 2, 28, bit=30, place=0.9),
        wrong(Target.GRADIENT, 1, 36),
    )
    done = run(tmp_path / "run", TRAINING, [str(STEPS)], nproc=3, settings=settings(*plan))
    assert done.stop.code == 0, done.log
    struck = {e["step"]: e for e in done.of("drill")}
    assert list(struck) == [5, 12, 20, 28, 36]
    assert done.params == reference.params
    # Verdicts on the same member within some seconds are one; what each rank wrote are all.
    found = {(e["damaged"], e["tensor"]) for e in done.of("diverged")}
    assert found == {(seat, struck[step]["tensor"]) for seat, step in ((1, 5), (2, 12), (2, 28))}
    assert {(fault, seat) for fault, seat, _ in verdicts(done)} == {("sdc", s) for s in range(3)}
    assert [e["step"] for e in done.of("rollback") if e["seat"] == 0] == [5, 12, 20, 28, 36]
    assert len(done.of("spawn")) == 3, "nobody was put out for it"


def test_of_two_nobody_can_say_whose_and_the_job_goes_on(tmp_path: Path) -> None:
    plan = wrong(Target.WEIGHT, 1, 5, bit=3)
    done = run(tmp_path / "run", TRAINING, ["30"], nproc=2, settings=settings(plan))
    assert done.stop.code == 0, done.log
    (told,) = [e for e in done.of("verdict") if e["fault"] == "sdc"]
    assert (told["fault"], told["seat"], told["peer"], told["confidence"]) == ("sdc", 0, 1, 0.5)
    assert "no majority" in told["reason"]
    assert told["evidence"]["undecided"]
    assert len(done.params) == 2, "they still differ: nobody was guessed to be right"


def test_a_rank_that_differs_can_be_replaced_instead(reference: Run, tmp_path: Path) -> None:
    plan = wrong(Target.OPTIMIZER, 1, 6, bit=7)
    done = run(
        tmp_path / "run",
        TRAINING,
        [str(STEPS)],
        nproc=3,
        settings=settings(plan, on_diverged="evict"),
    )
    assert done.stop.code == 0, done.log
    assert done.params == reference.params
    assert [e["member"] for e in done.of("exit") if e.get("code")] == [1]
    assert ("sdc", 1, "replica") in verdicts(done)
