"""A link between two ranks is cut for a while, or all between two halves; and a rank joins."""

from pathlib import Path

import pytest

from ftkit.launch.checker import Answer
from ftkit.launch.drill_catalogue import JOIN, PARTITION, PARTITION_HALF
from ftkit.launch.drill_job import Job
from ftkit.launch.drill_plan import choose
from ftkit.launch.drills import run_drill
from tests.drills.jobs import HERE, STEPS, TRAINING, Run

pytestmark = pytest.mark.multiproc


@pytest.mark.parametrize("fault", [PARTITION, PARTITION_HALF, JOIN])
def test_a_job_goes_on_to_the_same_bits(
    fault: str, reference: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(HERE.parents[1]))
    nproc = 4 if fault == PARTITION_HALF else 3
    job = Job(script=str(TRAINING), workload=(str(STEPS),), steps=STEPS, nproc=nproc)
    drill = choose(fault, None, seed=2, nproc=nproc, steps=STEPS)
    outcome, events = run_drill(drill, job, reference.events, tmp_path / "run")
    logs = "\n".join(p.read_text() for p in sorted(tmp_path.glob("run/logs/*.log")))
    assert outcome.outcome is Answer.PASS, f"{outcome.evidence}\n{logs}"
    assert outcome.params_equal
    if fault == PARTITION:
        assert [e for e in events if e["kind"] == "report" and e["lost"]], "both ends saw it break"
        assert [e for e in events if e["kind"] == "healed"]
    if fault == PARTITION_HALF:
        assert outcome.evidence["steps_apart"] != 0, "the coordinator's half went on"
        assert outcome.evidence["far"] == list(drill.seats)
