"""Whole nodes are lost, and bits rot: what is left in memory and parity is enough, bit for bit."""

from pathlib import Path
from typing import Any

import pytest

from ftkit.core.trace import read_run
from ftkit.launch.checker import Answer, Outcome
from ftkit.launch.drill_catalogue import CORRUPT_SHARD, LOSE_NODES
from ftkit.launch.drill_faults import LOSE_NODE
from ftkit.launch.drill_job import Job
from ftkit.launch.drill_plan import choose_nodes
from ftkit.launch.drills import run_drill
from tests.drills.jobs import HERE, TRAINING, Run, run

pytestmark = pytest.mark.multiproc

STEPS = 120
#: Nine megabytes of state: every node has some of it, in chunks of one.
WIDTH = 60_000

Events = list[dict[str, Any]]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("nodes") / "reference"
    done = run(folder, TRAINING, [str(STEPS), "", str(WIDTH)], nproc=1)
    assert done.stop.code == 0, done.log
    return done


@pytest.fixture
def drilled(undisturbed: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("PYTHONPATH", str(HERE.parents[1]))

    def drilled(fault: str, seed: int, **options: Any) -> tuple[Outcome, Events]:
        job = Job(script=str(TRAINING), workload=(str(STEPS), "", str(WIDTH)), **options)
        job = job.for_nodes(fault)
        drill = choose_nodes(fault, job, seed=seed)
        outcome, events = run_drill(drill, job, undisturbed.events, tmp_path / "run")
        logs = "\n".join(p.read_text() for p in sorted(tmp_path.glob("run/logs/*.log")))
        assert outcome.outcome is Answer.PASS, f"{outcome.evidence}\n{logs}"
        assert outcome.params_equal
        assert outcome.samples_lost == outcome.samples_doubled == outcome.survivor_exits == 0
        assert events == read_run(tmp_path / "run")
        return outcome, events

    return drilled


def test_a_node_is_lost_and_the_others_train_on(drilled: Any) -> None:
    outcome, events = drilled(LOSE_NODE, 2)
    assert outcome.steps_lost == 0
    assert not [e for e in events if e["kind"] == "rebuild"], "the survivors had it all"
    assert len({e["generation"] for e in events if e["kind"] == "parity"}) > 1, "parity goes on"


def test_m_nodes_and_all_ranks_are_lost_at_once(drilled: Any) -> None:
    outcome, events = drilled(LOSE_NODES, 1)
    rebuilt = [e for e in events if e["kind"] == "rebuild"]
    (resumed,) = {e["step"] for e in events if e["kind"] == "resume" and e["step"]}
    assert {e["step"] for e in rebuilt} == {resumed}
    assert len({e["node"] for e in rebuilt}) == 2
    assert resumed >= outcome.evidence["published"]


def test_a_single_parity_shard_is_enough_for_a_single_node(drilled: Any) -> None:
    _, events = drilled(LOSE_NODES, 3, nodes=3, nproc=1, parity="2+1")
    assert len([e for e in events if e["kind"] == "rebuild"]) == 1


def test_bits_rot_in_a_part_and_in_parity_and_then_a_node_is_lost(drilled: Any) -> None:
    outcome, events = drilled(CORRUPT_SHARD, 1)
    assert "digest" in " ".join(outcome.evidence["noticed"])
    assert len([e for e in events if e["kind"] == "rebuild"]) == 2, "the lost and the corrupt"
