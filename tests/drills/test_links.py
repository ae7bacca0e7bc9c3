"""A link between two ranks is cut for a while, and a rank joins others that train."""

from pathlib import Path

import pytest

from ftkit.launch.checker import Answer
from ftkit.launch.drill_catalogue import JOIN, PARTITION
from ftkit.launch.drill_job import Job
from ftkit.launch.drill_plan import choose
from ftkit.launch.drills import run_drill
from tests.drills.jobs import HERE, STEPS, TRAINING, Run

pytestmark = pytest.mark.multiproc


@pytest.mark.parametrize("fault", [PARTITION, JOIN])
def test_a_job_goes_on_to_the_same_bits(
    fault: str, reference: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(HERE.parents[1]))
    job = Job(script=str(TRAINING), workload=(str(STEPS),), steps=STEPS)
    drill = choose(fault, None, seed=2, nproc=3, steps=STEPS)
    outcome, events = run_drill(drill, job, reference.events, tmp_path / "run")
    logs = "\n".join(p.read_text() for p in sorted(tmp_path.glob("run/logs/*.log")))
    assert outcome.outcome is Answer.PASS, f"{outcome.evidence}\n{logs}"
    assert outcome.params_equal
    if fault == PARTITION:
        assert [e for e in events if e["kind"] == "report" and e["lost"]], "both ends saw it break"
        assert [e for e in events if e["kind"] == "healed"]
