"""Ray Train on two machines, of which Ray takes one away: its rank leaves between two steps."""

import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ftkit.core.trace import read_run
from tests.launch.engine_contract import PACED
from tests.launch.ray_cluster import Cluster, needs_ray_train, running_cluster

STEPS = 200
DRIVER = f"""
    import os
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ftkit.integrations import ray_train

    ray.init(address=os.environ["RAY_ADDRESS"])
    here = os.getcwd()
    TorchTrainer(
        ray_train.in_ranks("train.py", "{STEPS}"),
        torch_config=ray_train.FtkitConfig(run_dir=here),
        scaling_config=ScalingConfig(num_workers=2, resources_per_worker={{"CPU": 2}}),
        run_config=RunConfig(storage_path=os.path.join(here, "storage")),
    ).fit()
"""


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with running_cluster("drain") as cluster:
        yield cluster


@pytest.mark.ray
@pytest.mark.multiproc
@pytest.mark.timeout(500)  # a second raylet, and a cluster that is busy for it
@needs_ray_train
def test_a_worker_whose_machine_ray_drains_loses_no_step(
    cluster: Cluster,
    tmp_path: Path,
) -> None:
    (tmp_path / "train.py").write_text(textwrap.dedent(PACED))
    (tmp_path / "driver.py").write_text(textwrap.dedent(DRIVER))
    log = tmp_path / "log"

    def said(kind: str) -> list[dict[str, Any]]:
        return [
            e
            for run in tmp_path.glob("*/events")
            for e in read_run(run.parent)
            if e["kind"] == kind
        ]

    while not (before := machines(cluster)):
        time.sleep(0.1)  # the cluster answers before its head has told of itself
    with cluster.machine(), log.open("wb") as out:
        job = subprocess.Popen(
            [sys.executable, "driver.py"],
            cwd=tmp_path,
            env=cluster.environ | {"RAY_ADDRESS": cluster.address},
            stdout=out,
            stderr=out,
        )
        try:
            deadline = time.monotonic() + 250
            while not any(e["step"] > 2 for e in said("commit")):
                assert job.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
            at = time.monotonic()
            (machine,) = machines(cluster) - before
            cluster.drain(machine)
            assert job.wait(timeout=150) == 0, log.read_text()
        finally:
            job.kill()
            job.wait()
    left = [e for e in said("left") if e["mono"] > at]
    assert len(left) == 1, f"the rank left by itself: {left}\n{log.read_text()}"
    assert [k for k in ("report", "rollback", "halt") for e in said(k) if e["mono"] > at] == []
    votes = {(e["step"], e["generation"]) for e in said("commit")}
    assert sorted(step for step, _ in votes) == list(range(1, STEPS + 1)), "none was played twice"


def machines(cluster: Cluster) -> set[str]:
    """Ray's names of those that are up."""
    from ray.autoscaler.v2.sdk import get_cluster_status

    status = get_cluster_status(cluster.address)
    return {str(n.node_id) for n in (*status.active_nodes, *status.idle_nodes)}
