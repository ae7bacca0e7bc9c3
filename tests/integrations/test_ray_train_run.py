"""A run of Ray Train that loses a rank, then a worker, and grows.

It has a cluster of its own: its workers take every processor of it, so the hundredth of one that an
agent of another test still holds would keep it waiting.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ftkit.core.trace import read_run
from tests.integrations import ray_train_job
from tests.launch.engine_contract import leftovers
from tests.launch.ray_cluster import Cluster, needs_ray_train, running_cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running_cluster("ray-train") as cluster:
        yield cluster


@pytest.mark.ray
@pytest.mark.multiproc
@pytest.mark.timeout(500)
@needs_ray_train
def test_ray_train_loses_a_rank_and_a_worker_and_grows_and_loses_no_bit(
    cluster: Cluster, tmp_path: Path
) -> None:
    def start(folder: str, how: str) -> subprocess.Popen[bytes]:
        (tmp_path / folder).mkdir()
        with (tmp_path / folder / "log").open("wb") as log:
            return subprocess.Popen(
                [sys.executable, str(ray_train_job.__file__), str(tmp_path / folder), how],
                env=cluster.environ | {"RAY_ADDRESS": cluster.address},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    with start("alone", "alone") as alone, start("job", "faults") as job:
        try:
            deadline = time.monotonic() + 250
            while not (tmp_path / "job" / "full").exists():
                assert job.poll() is None, (tmp_path / "job" / "log").read_text()
                assert time.monotonic() < deadline, (tmp_path / "job" / "log").read_text()
                time.sleep(0.1)
            with cluster.machine():
                job.wait(timeout=150)
            alone.wait(timeout=60)
        finally:
            alone.kill()
            job.kill()
    said = {name: (tmp_path / name / "log").read_text() for name in ("alone", "job")}
    assert alone.returncode == 0, said["alone"]
    assert job.returncode == 0, said["job"]
    truth = json.loads((tmp_path / "alone" / "seat-0.json").read_text())
    # All seats were there at the end, those of the third worker too.
    for seat in range(6):
        assert json.loads((tmp_path / "job" / f"seat-{seat}.json").read_text()) == truth
    assert "rank 0" in said["job"], "worker 0 reported"
    runs = sorted((tmp_path / "job" / "runs").iterdir(), key=lambda run: run.stat().st_mtime)
    small, large = map(read_run, runs)  # the group was started anew once, to grow
    decisions = [e for e in small if e["kind"] == "decision"]
    assert [e["seat"] for e in decisions if e["action"] == "respawn"] == [1, 2, 3]
    done, more = ({e["step"] for e in events if e["kind"] == "commit"} for events in (small, large))
    assert max(done) + 1 == min(more) == ray_train_job.GROWS, "from the step it had come to"
    assert [x for run in runs for x in leftovers(run.name)] == []
