"""A Ray cluster of a test's own."""

import contextlib
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
START_LIMIT_S = 90.0
#: Ray's provider of machines that are processes goes by names: this is what it calls the head.
HEAD = "0".rjust(5, "0").rjust(56, "f")

needs_ray_train = pytest.mark.skipif(
    any(importlib.util.find_spec(m) is None for m in ("pandas", "pydantic", "cloudpickle")),
    reason="ray.train is not installed: ftkit[raytrain]",
)


class Cluster:
    """A Ray head of our own on free ports, and everything below it.

    With `on_demand`, the resources of a kind of machine, its autoscaler starts up to three of them.
    """

    def __init__(self, folder: Path, *, on_demand: dict[str, float] | None = None) -> None:
        self._folder = folder
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
        head = self.environ
        if on_demand is not None:
            told = folder / "autoscaling.json"
            told.write_text(json.dumps(_autoscaling(self.address, on_demand)))
            command += [f"--autoscaling-config={told}"]
            head = self.environ | {
                "AUTOSCALER_UPDATE_INTERVAL_S": "1",
                "RAY_FAKE_CLUSTER": "1",
                "RAY_enable_autoscaler_v2": "1",
                "RAY_CLOUD_INSTANCE_ID": HEAD,
                "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD,
            }
        self._log = (folder / "head.log").open("wb")
        self.process = subprocess.Popen(
            command, env=head, stdout=self._log, stderr=self._log, start_new_session=True
        )

    @contextmanager
    def machine(self, *options: str) -> Iterator[None]:
        """Another machine of the cluster, as far as Ray knows; `options` are `ray start`'s."""
        command = ["ray", "start", f"--address={self.address}", "--block", "--disable-usage-stats"]
        command += ["--num-cpus=2", "--object-store-memory=100000000", *options]
        with (self._folder / "machine.log").open("wb") as log:
            process = subprocess.Popen(
                command, env=self.environ, stdout=log, stderr=log, start_new_session=True
            )
            below = list[psutil.Process]()
            try:
                deadline = time.monotonic() + START_LIMIT_S
                while b"runtime started" not in (said := Path(log.name).read_bytes()):
                    assert process.poll() is None, said
                    assert time.monotonic() < deadline, said
                    time.sleep(0.1)
                below = psutil.Process(process.pid).children(recursive=True)
                yield
            finally:
                process.terminate()  # it says goodbye: what it had would be booked in vain
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=20)
                _kill(process, below)

    def drain(self, machine: str) -> None:
        """Tell Ray that a machine is about to be taken away, as a cloud's notice does."""
        command = ["ray", "drain-node", f"--address={self.address}", f"--node-id={machine}"]
        command += ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot"]
        command += ["--deadline-remaining-seconds=60"]
        subprocess.run(command, env=self.environ, check=True, capture_output=True, timeout=60)

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
        # At once: asked to end, `ray start` takes half a minute.
        below = list[psutil.Process]()
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended, and was waited for
            below = psutil.Process(self.process.pid).children(recursive=True)
        _kill(self.process, below)
        self._log.close()


def _kill(process: subprocess.Popen[bytes], below: list[psutil.Process]) -> None:
    process.kill()
    process.wait()
    for left in below:
        with contextlib.suppress(psutil.NoSuchProcess):
            left.kill()
    psutil.wait_procs(below, timeout=20)


#: What a machine would be set up by; it has to be said that it is not.
_NOTHING = (
    *("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands"),
    *("head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files"),
)


def _autoscaling(address: str, resources: dict[str, float]) -> dict[str, Any]:
    """What Ray's autoscaler is told, to start machines as processes of this one."""
    head = "ray.head.default"
    return {
        "cluster_name": "ftkit",
        "max_workers": 3,
        "upscaling_speed": 10,
        "idle_timeout_minutes": 5,
        "provider": {
            # By its name, "fake_multinode", it asks for a file that Ray's wheel lacks.
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": address,
            "launch_multiple": True,
            "head_node_id": HEAD,
        },
        "auth": {},
        "file_mounts": {},
        **{key: [] for key in _NOTHING},
        "head_node_type": head,
        "available_node_types": {
            head: {"resources": {"CPU": 2}, "node_config": {}, "max_workers": 0},
            "on-demand": {
                "resources": {**resources, "object_store_memory": 100_000_000},
                "node_config": {},
                "min_workers": 0,
                "max_workers": 3,
            },
        },
    }


@contextmanager
def running_cluster(name: str, *, on_demand: dict[str, float] | None = None) -> Iterator[Cluster]:
    """A cluster of one machine that answers, until the block ends."""
    # Ray's socket paths have to fit 107 bytes, so pytest's own folder is too deep.
    folder = Path("/tmp") / f"ftkit-{name}-{os.getpid()}"
    folder.mkdir()
    cluster = None
    try:
        cluster = Cluster(folder, on_demand=on_demand)
        deadline = time.monotonic() + START_LIMIT_S
        while not (answers(cluster.gcs) and answers(cluster.dashboard)):
            assert cluster.process.poll() is None, (folder / "head.log").read_text()
            assert time.monotonic() < deadline, (folder / "head.log").read_text()
            time.sleep(0.1)
        yield cluster
    finally:
        if cluster is not None:
            cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True
