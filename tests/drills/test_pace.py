"""One rank of a real job loses time: it is named, with the factor, and nobody loses its place."""

from pathlib import Path

import pytest

from ftkit.core.pace_plan import PaceFault
from ftkit.launch.checker import Answer
from ftkit.launch.drill_job import Job
from ftkit.launch.drill_plan import choose
from ftkit.launch.drills import run_drill
from tests.drills.jobs import HERE

pytestmark = pytest.mark.multiproc

STEPS = 80


def test_a_slow_rank_is_named_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(HERE.parents[1]))
    job = Job(steps=STEPS).for_pace("slow-steady")
    drill = choose(PaceFault.STEADY, None, seed=5, nproc=3, steps=STEPS)
    outcome, events = run_drill(drill, job, None, tmp_path / "run")
    # Without an undisturbed run nothing can be said of the parameters.
    assert outcome.evidence["problems"] == []
    assert outcome.outcome is Answer.UNKNOWN
    assert outcome.evidence["factor"] is not None
    steps = [e for e in events if e["kind"] == "steps"]
    assert sorted(s for e in steps for s in e["steps"]) == list(range(1, STEPS + 1))
    assert "collectives" in {e["waits_from"] for e in steps}
