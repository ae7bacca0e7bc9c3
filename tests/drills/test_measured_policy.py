"""What a job decides by its own measurements: how often it saves, and whom it waits for."""

import itertools
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from ftkit.core.fault_plan import Kind, Point
from ftkit.launch.history import History
from ftkit.launch.store_drills import OnDisk
from tests.drills.jobs import HERE, Run, fault, run
from tests.drills.sharded import LATE
from tests.drills.waiting import BUILD, SECOND_LOSS

pytestmark = pytest.mark.multiproc

JOB = HERE / "waiting.py"
STEPS = 60


def two_losses(folder: Path, **env: str) -> Run:
    """The first tells what a loss costs here; the second is decided by that."""
    faults = [
        fault(Kind.KILL, Point.BACKWARD, 1, 14),
        fault(Kind.KILL, Point.BACKWARD, 2, SECOND_LOSS),
    ]
    done = run(folder, JOB, [str(STEPS)], nproc=3, faults=faults, settings={"env": env})
    assert done.stop.code == 0, f"{done.stop}\n{done.log}"
    assert {e["step"] for e in done.of("commit")} == set(range(1, STEPS + 1))
    return done


def decisions(done: Run, *actions: str) -> list[dict[str, Any]]:
    return [e for e in done.of("decision") if e["action"] in actions]


def lost_s(decision: dict[str, Any]) -> dict[str, float]:
    return {row["option"]: row["lost_s"] for row in decision["costs"]["table"]}


def judged(done: Run) -> dict[str, Any]:
    """What was decided about the second loss."""
    first, second = decisions(done, "wait", "go-on")[:2]
    assert first["action"] == "go-on"
    assert "not measured yet in this job" in first["reason"]
    return second


def formed_after(done: Run, decision: dict[str, Any]) -> dict[str, Any]:
    return next(e for e in decisions(done, "form") if e["mono"] > decision["mono"])


def test_a_replacement_is_waited_for_where_a_mesh_is_dear_to_build(tmp_path: Path) -> None:
    done = two_losses(tmp_path / "run", **{BUILD: "1.5"})
    waited = judged(done)
    assert waited["action"] == "wait", waited["reason"]
    assert lost_s(waited)["wait"] < lost_s(waited)["respawn"]
    formed = formed_after(done, waited)
    assert formed["members"] == [0, 1, 2]
    assert formed["costs"]["taken"] == "wait"
    assert len(done.params) == 1


def test_who_comes_late_is_not_waited_for(tmp_path: Path) -> None:
    done = two_losses(tmp_path / "run", **{LATE: "1.5"})
    went = judged(done)
    assert went["action"] == "go-on", went["reason"]
    assert lost_s(went)["wait"] > lost_s(went)["respawn"]
    formed = formed_after(done, went)
    assert formed["members"] == [0, 1]
    assert formed["costs"]["taken"] == "respawn"
    assert len(done.params) == 1


def test_the_interval_of_checkpoints_follows_what_is_seen(tmp_path: Path) -> None:
    history, disk = tmp_path / "history.jsonl", tmp_path / "disk"
    machine = socket.gethostname()
    before, now = History(str(history), "before"), time.time()
    before.append("job", at=now - 3600, chain="x", nodes=[machine])
    for k in range(60):
        before.append("fault", at=now - 3600 + 60 * k, node=machine, fault="exited")
    settings = {
        "checkpoint_dir": str(disk), "checkpoint_every": "auto", "checkpoint_keep": "",
        "history": str(history),
    }  # fmt: skip
    steps = 120
    done = run(tmp_path / "run", JOB, [str(steps)], nproc=2, settings=settings, max_stall_s=8.0)
    assert done.stop.code == 0, done.log
    chosen = done.of("checkpoint-interval")
    assert "assumed" in chosen[0]["reason"]
    assert all(b["before"] == a["every"] for a, b in itertools.pairwise(chosen))
    costs = done.of("checkpoint-cost")
    assert costs, "a save was made early, to see what it costs"
    # One failure a minute: less than 60 s of writing, which was assumed, is what counts now.
    last = chosen[-1]
    assert "checkpoint_block_s" in last["measured"]
    assert last["seconds"] < 60 < chosen[0]["seconds"] + 1
    assert last["seconds"] == pytest.approx(last["every"] * last["step_s"], rel=0.01)
    early = [e["step"] for e in done.of("checkpoint") if e["step"] < steps]
    assert any(a["first"] in early for a in chosen), "as it was said"
    held = OnDisk.read(disk)
    assert not held.damaged
    assert set(early) < set(held.good)

    again = run(tmp_path / "again", JOB, [str(steps + 10)], nproc=2, settings=settings)
    assert again.stop.code == 0, again.log
    assert {e["step"] for e in again.of("restore")} == {steps}
