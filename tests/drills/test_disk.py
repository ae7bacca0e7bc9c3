"""Checkpoints of whole jobs: written while they train, begun from, and with a broken disk."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from ftkit.checkpoint.persist.lease import Lease
from ftkit.checkpoint.persist.local_store import LocalStore
from ftkit.core import exit_codes
from ftkit.core.errors import RootInUse, UsageError
from ftkit.core.ids import JobId
from ftkit.core.trace import read_run
from ftkit.launch.checker import Answer
from ftkit.launch.engine import Engine
from ftkit.launch.faulty_store import StoreFault, StoreFaultKind
from ftkit.launch.store_drills import OnDisk, Witness
from tests.drills.jobs import STEPS, TRAINING, Run, judge, run

pytestmark = pytest.mark.multiproc


def settings(folder: Path, **more: object) -> dict[str, object]:
    return {"checkpoint_dir": str(folder), "checkpoint_every": 20, "checkpoint_keep": "", **more}


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of a job that ended after 60 steps, of which the last was not due."""
    folder = tmp_path_factory.mktemp("half")
    more = settings(folder / "disk", checkpoint_every=25)
    done = run(folder / "run", TRAINING, ["60"], nproc=1, nodes=2, settings=more)
    assert done.stop.code == 0, done.log
    # A step that was overtaken by the next due one is given up, on a machine that is busy.
    assert OnDisk.read(folder / "disk").good[-1] == 60
    (last,) = done.of("checkpoint-last")
    assert (last["step"], last["failed"]) == (60, "")
    return folder / "disk"


def copy_of(folder: Path, to: Path) -> Path:
    for path in folder.rglob("*"):
        if path.is_file():
            target = to / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return to


def test_another_job_of_another_size_goes_on_where_the_first_ended_past_what_is_damaged(
    half: Path, reference: Run, tmp_path: Path
) -> None:
    """The newest one is damaged: that is said, and the one before is used."""
    disk = copy_of(half, tmp_path / "disk")
    begin, damaged = 60, 900
    newer = copy_of(disk / f"step-{begin}", disk / f"step-{damaged}")
    (newer / "commit.json").write_bytes(b"{}")
    done = run(tmp_path / "run", TRAINING, [str(STEPS)], nproc=3, settings=settings(disk))
    assert done.stop.code == 0, done.log
    assert done.params == reference.params
    (skipped,) = (e for e in done.of("checkpoint-skipped") if "coordinator" in e)
    assert skipped["step"] == damaged
    assert "is damaged" in skipped["reason"]
    assert {e["step"] for e in done.of("restore")} == {begin}
    assert {e["source"] for e in done.of("restore")} == {str(disk)}
    assert min(e["step"] for e in done.of("commit")) == begin + 1
    held = OnDisk.read(disk)
    assert held.damaged.keys() <= {damaged}
    assert held.good[-1] == STEPS


def test_a_fresh_start_begins_at_the_first_step(half: Path, reference: Run, tmp_path: Path) -> None:
    disk = copy_of(half, tmp_path / "disk")
    more = settings(disk, checkpoint_fresh=True)
    done = run(tmp_path / "run", TRAINING, [str(STEPS)], settings=more)
    assert done.stop.code == 0, done.log
    assert done.params == reference.params
    assert not done.of("restore")
    assert min(e["step"] for e in done.of("commit")) == 1
    written = {e["step"] for e in done.of("checkpoint")}
    assert written
    assert set(OnDisk.read(disk).good) == written


def test_a_second_job_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with (
        Lease.take(LocalStore(tmp_path / "disk"), JobId("first")),
        pytest.raises(RootInUse, match="in use by job 'first'"),
    ):
        run(tmp_path / "run", TRAINING, ["5"], settings=settings(tmp_path / "disk"))
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"--checkpoint-dir .*/file"):
        run(tmp_path / "run2", TRAINING, ["5"], settings=settings(tmp_path / "file"))


def test_all_memory_is_lost_and_the_job_goes_on_from_disk(reference: Run, tmp_path: Path) -> None:
    folder, disk = tmp_path / "run", tmp_path / "disk"

    def strike(_: Engine) -> None:
        (pid,) = (e["pid"] for e in read_run(folder) if e["kind"] == "spawn" and e["seat"] == 1)
        parent = psutil.Process(pid).parent()
        assert parent is not None
        os.kill(parent.pid, signal.SIGKILL)

    struck: list[bool] = []

    def poll(engine: Engine) -> None:
        if not struck and any(e["kind"] == "checkpoint" for e in read_run(folder)):
            struck.append(True)
            strike(engine)

    done = run(folder, TRAINING, [str(STEPS)], settings=settings(disk), on_poll=poll)
    assert done.stop.code == 0, f"{done.stop.reason}\n{done.log}"
    assert done.params == reference.params
    assert {e["source"] for e in done.of("restore")} == {str(disk)}
    assert {e["step"] for e in done.of("restore")} <= set(OnDisk.read(disk).good)


def test_an_agent_is_killed_at_a_byte_of_a_checkpoint(reference: Run, tmp_path: Path) -> None:
    # All of this small state is one chunk, and the last node's.
    fault = StoreFault(kind=StoreFaultKind.KILL, node=2, seat=2, byte=9000)
    folder = tmp_path / "run"
    witness = Witness(folder)
    more = witness.settings(fault, STEPS)
    done = run(
        folder,
        TRAINING,
        [str(STEPS)],
        nodes=3,
        nproc=1,
        settings=more,
        on_poll=lambda _: witness.poll(),
    )
    outcome = witness.judge(judge(done, reference, seats=3), done.events, seat=fault.seat)
    assert outcome.outcome is Answer.PASS, f"{outcome.evidence}\n{done.stop}\n{done.log}"
    assert outcome.steps_lost == 0
    assert outcome.evidence["checkpoints"]


def test_a_full_disk_is_reported_and_costs_no_step(reference: Run, tmp_path: Path) -> None:
    fault = StoreFault(kind=StoreFaultKind.FULL, node=1, seat=1, byte=30_000)
    folder = tmp_path / "run"
    witness = Witness(folder)
    done = run(
        folder,
        TRAINING,
        [str(STEPS)],
        nodes=2,
        nproc=1,
        settings=witness.settings(fault, STEPS),
        on_poll=lambda _: witness.poll(),
    )
    ranks = judge(done, reference, seats=2, evicts=False)
    full = replace(ranks, fault=StoreFaultKind.FULL)
    outcome = witness.judge(full, done.events, seat=fault.seat)
    assert outcome.outcome is Answer.PASS, f"{outcome.evidence}\n{done.stop}\n{done.log}"
    assert outcome.steps_lost == 0
    assert outcome.params_equal
    assert not done.of("rollback")
    (last,) = done.of("checkpoint-last")
    assert last["step"] == STEPS
    assert "is full" in last["failed"]


def test_a_job_that_is_told_to_end_leaves_its_newest_snapshot(tmp_path: Path) -> None:
    disk = tmp_path / "disk"

    def poll(engine: Engine) -> None:
        if any(e["kind"] == "commit" and e["step"] >= 30 for e in read_run(tmp_path / "run")):
            engine.interrupt()

    # Nothing is due before the end.
    more = settings(disk, checkpoint_every=0)
    done = run(
        tmp_path / "run", TRAINING, ["100000"], nodes=2, nproc=1, settings=more, on_poll=poll
    )
    assert done.stop.code == exit_codes.INTERRUPTED
    committed = max(e["step"] for e in done.of("commit"))
    (step,) = OnDisk.read(disk).good
    # The last one or two may have been in capture when the ranks were told.
    assert committed - 2 <= step <= committed
