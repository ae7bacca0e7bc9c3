"""Both engines against one contract, and what only Ray does."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from ftkit.core.errors import UsageError
from ftkit.launch.config import JobConfig
from ftkit.launch.embedded import EmbeddedEngine
from ftkit.launch.engine import Engine
from tests.launch.engine_contract import WAIT, EngineContract, Jobs, drive, leftovers

ROOT = Path(__file__).resolve().parents[2]
START_LIMIT_S = 90.0


@pytest.mark.multiproc
class TestEmbedded(EngineContract):
    def make(self, config: JobConfig, secret: str) -> Engine:
        return EmbeddedEngine(config, secret)


class Cluster:
    """A Ray head of our own on free ports, and everything below it."""

    def __init__(self, folder: Path) -> None:
        self.gcs, self.dashboard, client = (free_port() for _ in range(3))
        environ = {n: v for n, v in os.environ.items() if not n.startswith("RAY_")}
        self.environ = environ | {
            "PYTHONPATH": str(ROOT),
            "RAY_USAGE_STATS_ENABLED": "0",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{environ['PATH']}",
        }
        self.address = f"127.0.0.1:{self.gcs}"
        command = ["ray", "start", "--head", "--block", "--disable-usage-stats", "--num-cpus=2"]
        command += ["--node-ip-address=127.0.0.1", f"--port={self.gcs}", f"--temp-dir={folder}"]
        command += [f"--dashboard-port={self.dashboard}", f"--ray-client-server-port={client}"]
        command += ["--object-store-memory=100000000"]
        self._log = (folder / "head.log").open("wb")
        self.process = subprocess.Popen(
            command, env=self.environ, stdout=self._log, stderr=self._log, start_new_session=True
        )

    def actors(self) -> list[str]:
        """ftkit's actors that run on this cluster."""
        titles = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                titles.append(" ".join(process.cmdline()))
            except psutil.Error:
                continue  # it ended meanwhile
        return [t for t in titles if "AgentHost" in t or "CoordinatorHost" in t]

    def stop(self) -> None:
        below = psutil.Process(self.process.pid).children(recursive=True)
        self.process.terminate()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for process in psutil.wait_procs(below, timeout=5)[1]:
            process.kill()
        self._log.close()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    # Ray's socket paths have to fit 107 bytes, so pytest's own folder is too deep.
    folder = Path("/tmp") / f"ftkit-ray-{os.getpid()}"
    folder.mkdir()
    cluster = Cluster(folder)
    try:
        deadline = time.monotonic() + START_LIMIT_S
        while not (answers(cluster.gcs) and answers(cluster.dashboard)):
            assert cluster.process.poll() is None, (folder / "head.log").read_text()
            assert time.monotonic() < deadline, (folder / "head.log").read_text()
            time.sleep(0.1)
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.ray
@pytest.mark.multiproc
class TestRay(EngineContract):
    @pytest.fixture(autouse=True)
    def connected(self, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        yield
        deadline = time.monotonic() + 5
        while cluster.actors() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert cluster.actors() == []

    def make(self, config: JobConfig, secret: str) -> Engine:
        from ftkit.launch.ray_engine import RayEngine

        return RayEngine(config, secret)
