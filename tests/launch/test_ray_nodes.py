"""Ray on hosts with addresses of their own: one of them is gone, and the others train on at once."""

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.children import python
from benchmarks.hosts import Hosts
from ftkit.core.trace import read_run
from ftkit.launch.arenas import sweep
from tests.drills.jobs import TRAINING, run

pytestmark = [
    pytest.mark.ray,
    pytest.mark.multiproc,
    pytest.mark.timeout(400),  # three raylets and a job on them, on a machine that has other work
    pytest.mark.skipif(not Hosts.available(), reason="network namespaces take root, and `ip`"),
]

STEPS = 120


@pytest.fixture
def folder() -> Iterator[Path]:
    # Ray's socket paths have to fit 107 bytes, so pytest's own folder is too deep.
    path = Path("/tmp") / f"ftkit-rays-{os.getpid()}"
    path.mkdir()
    yield path
    shutil.rmtree(path)
    sweep(Path("/dev/shm"))  # what the host that was killed had there


def test_a_host_is_killed_and_the_others_go_on_long_before_ray_knows(
    folder: Path, tmp_path: Path
) -> None:
    from benchmarks.ray_hosts import RayHosts

    where, submit = folder / "run", ("ray", "job", "submit", "--address")
    with RayHosts(3, folder, jobs=True) as cluster:
        options = ("--nodes", "3", "--run-dir", str(where), str(TRAINING), str(STEPS))
        command = python("-m", "ftkit.launch.cli", "run", *options)
        job = cluster.start(0, (*submit, cluster.jobs_url, "--", *command))
        deadline = time.monotonic() + 150
        while not [e for e in commits(where) if e["step"] == 5]:
            assert job.poll() is None, said(folder)
            assert time.monotonic() < deadline, said(folder)
            time.sleep(0.1)
        killed = cluster.kill(2)
        assert job.wait(timeout=150) == 0, said(folder)
        addresses = cluster.hosts.addresses
    events = read_run(where)
    first = max(e["generation"] for e in commits(where) if e["mono"] <= killed)
    after = {
        e["seat"]: e["mono"] - killed for e in reversed(commits(where)) if e["generation"] > first
    }
    assert len(after) == 2
    assert max(after.values()) < 10, "Ray takes longer to see that a node is gone"
    assert "refuses connections" in next(e["reason"] for e in events if e["kind"] == "verdict")
    assert {e["host"] for e in events if e["kind"] == "board"} == set(addresses)
    final = [e["params"] for e in events if e["kind"] == "final"]
    undisturbed = run(tmp_path / "run", TRAINING, [str(STEPS)], nproc=1)
    assert final == [*undisturbed.params] * 2


def commits(where: Path) -> list[dict[str, Any]]:
    return [e for e in read_run(where) if e["kind"] == "commit"] if where.exists() else []


def said(folder: Path) -> str:
    return "\n".join(path.read_text() for path in folder.glob("child-*"))
