"""Who is in the world changes: a spare steps in, a node is given notice, ranks go and come."""

from pathlib import Path

import pytest

from ftkit.launch.checker import Answer
from ftkit.launch.drill_catalogue import SHRINK_GROW, SPARE
from ftkit.launch.drill_faults import PREEMPT
from ftkit.launch.drill_job import Job
from ftkit.launch.drill_plan import choose
from ftkit.launch.drills import run_drill
from tests.drills.jobs import HERE, STEPS, TRAINING, Run

pytestmark = pytest.mark.multiproc


@pytest.mark.parametrize("fault", [SPARE, PREEMPT, SHRINK_GROW])
def test_a_job_goes_on_to_the_same_bits(
    fault: str, reference: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(HERE.parents[1]))
    job = Job(
        script=str(TRAINING),
        workload=(str(STEPS),),
        steps=STEPS,
        nproc=3,
        spares=int(fault == SPARE),
    )
    drill = choose(fault, None, seed=3, nproc=3, steps=STEPS)
    outcome, events = run_drill(drill, job, reference.events, tmp_path / "run")
    logs = "\n".join(p.read_text() for p in sorted(tmp_path.glob("run/logs/*.log")))
    assert outcome.outcome is Answer.PASS, f"{outcome.evidence}\n{logs}"
    assert outcome.params_equal
    if fault == SPARE:
        (resume,) = (e for e in events if e["kind"] == "resume" and e["generation"] > 1)
        grown = [e for e in events if e["kind"] == "decision" and e["action"] == "grown"]
        assert "spare" in str([e for e in events if e["kind"] == "decision"])
        assert len(resume["members"]) == 2
        assert len(grown[0]["members"]) == 3, "the spare is in"
    if fault == PREEMPT:
        assert outcome.steps_lost == 0
        assert not [e for e in events if e["kind"] == "rollback"], "no step was played again"
