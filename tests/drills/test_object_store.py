"""A whole job on an object store: written to, killed with everything it had, and gone on from."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ftkit.checkpoint.persist.checkpoint import load, steps
from ftkit.checkpoint.persist.store import open_store
from ftkit.core.fault_plan import Kind, Point, to_environ
from ftkit.core.trace import read_run
from tests.drills.jobs import HERE, STEPS, TRAINING, Run, alive, fault, run
from tests.object_store import BUCKET, options, s3_server

pytestmark = pytest.mark.multiproc

LIMIT_S = 60.0


def kill_at_its_first_checkpoint(folder: Path, url: str) -> None:
    """`ftkit run`, which comes to stand still in step 50 and is killed with its agents."""
    standing_still = [fault(Kind.STOP, Point.FORWARD, seat=1, step=50)]
    command = [sys.executable, "-m", "ftkit.launch.cli", "run", "--nproc", "2", "--max-stall", "60"]
    command += ["--checkpoint-dir", url, "--checkpoint-every", "20", "--run-dir", str(folder)]
    environ = os.environ | to_environ(standing_still) | {"PYTHONPATH": str(HERE.parents[1])}
    with subprocess.Popen(
        [*command, str(TRAINING), str(STEPS)], env=environ, start_new_session=True
    ) as process:
        try:
            deadline = time.monotonic() + LIMIT_S
            while not any(e["kind"] == "checkpoint" for e in read_run(folder)):
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)
        finally:
            process.send_signal(signal.SIGKILL)
    pids = [e["pid"] for e in read_run(folder) if e["kind"] == "spawn"]
    while any(map(alive, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_job_on_s3_is_killed_and_started_again(
    reference: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with s3_server() as environ:
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        url = f"s3://{BUCKET}/run"
        kill_at_its_first_checkpoint(tmp_path / "killed", url)
        store = open_store(url, **options(environ))
        begin = steps(store)[-1]
        more = {"checkpoint_dir": url, "checkpoint_keep": "last:1"}
        done = run(tmp_path / "again", TRAINING, [str(STEPS)], nproc=3, settings=more)
        assert done.stop.code == 0, f"{done.stop.reason}\n{done.log}"
        assert done.params == reference.params
        assert {(e["step"], e["source"]) for e in done.of("restore")} == {(begin, url)}
        assert steps(store) == [STEPS], "the last step is there, and what nobody keeps is not"
        load(store, steps(store)[0]).verify()
        assert "lease.json" not in store.names()
