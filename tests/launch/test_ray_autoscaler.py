"""Ray's autoscaler starts the machines that a job books, and another for one that is lost."""

import itertools
import subprocess
import sys
import textwrap
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from ftkit.core.trace import read_run
from tests.launch.ray_cluster import Cluster, running_cluster

CLI = [sys.executable, "-m", "ftkit.launch.cli"]
SCRIPT = """
    import time
    import torch
    import ftkit
    from tests.drills.training import Curve, build

    torch.set_num_threads(1)
    session = ftkit.init()
    model = build(16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    session.protect(model=model, optimizer=optimizer)
    for step in session.steps(Curve(), slots=6, slot_size=4, until=100_000):
        with step:
            for x, y in step.batches():
                torch.nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
        time.sleep(0.1)
"""


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with running_cluster("autoscaler", on_demand={"CPU": 1, "trainer": 1}) as cluster:
        yield cluster


@pytest.mark.ray
@pytest.mark.multiproc
@pytest.mark.timeout(500)  # three raylets start, one after another
def test_machines_are_started_for_a_job_and_for_what_it_lost(
    cluster: Cluster, tmp_path: Path
) -> None:
    (tmp_path / "train.py").write_text(textwrap.dedent(SCRIPT))
    log, run = tmp_path / "log", tmp_path / "run"
    command = [*CLI, "run", "--engine", "ray", "--nodes", "2", "--nproc", "1", "--no-preload"]
    command += ["--resources", "trainer=1", "--run-dir", str(run), "train.py"]
    with log.open("wb") as out:
        job = subprocess.Popen(
            command,
            cwd=tmp_path,
            env=cluster.environ | {"RAY_ADDRESS": cluster.address},
            stdout=out,
            stderr=out,
        )

    def until(what: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 200
        while not what():
            assert job.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)

    try:
        until(lambda: _worlds(run) == [2])
        assert "no machine of the cluster has trainer" in log.read_text()
        lost = _machines(cluster)[-1]
        lost.kill()
        until(lambda: _worlds(run) == [2, 1, 2])
    finally:
        job.terminate()
        job.wait(timeout=60)
    assert lost not in (now := _machines(cluster))
    assert len(now) == 3, "the head, the machine that stayed and a new one"


def _worlds(run: Path) -> list[int]:
    """Of how many ranks the worlds were that committed a step, in their order, each change once."""
    seats = defaultdict[int, set[int]](set)
    for event in read_run(run) if run.exists() else []:
        if event["kind"] == "commit":
            seats[event["generation"]].add(event["seat"])
    return [size for size, _ in itertools.groupby(len(seats[g]) for g in sorted(seats))]


def _machines(cluster: Cluster) -> list[psutil.Process]:
    """The raylets, the oldest first: each is a machine to Ray."""
    below = psutil.Process(cluster.process.pid).children(recursive=True)
    return sorted((p for p in below if p.name() == "raylet"), key=psutil.Process.create_time)
