"""docs/cluster.md: what is to be copied from it works, as far as one machine can tell."""

import os
import re
import signal
import stat
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.docs.blocks import PAGES, ROOT, blocks
from tests.docs.lookup import wrong_in_command

PAGE = ROOT / "docs" / "cluster.md"

#: Fields of KubeRay's API ray.io/v1, by its reference; below a template they are Kubernetes'.
JOB = {
    "activeDeadlineSeconds", "backoffLimit", "clusterSelector", "deletionStrategy", "entrypoint",
    "entrypointNumCpus", "entrypointNumGpus", "entrypointResources", "jobId", "managedBy",
    "metadata", "rayClusterSpec", "runtimeEnvYAML", "shutdownAfterJobFinishes", "submissionMode",
    "submitterConfig", "submitterPodTemplate", "suspend", "ttlSecondsAfterFinished",
}  # fmt: skip
CLUSTER = {
    "autoscalerOptions", "enableInTreeAutoscaling", "gcsFaultToleranceOptions", "headGroupSpec",
    "headServiceAnnotations", "managedBy", "rayVersion", "suspend", "workerGroupSpecs",
}  # fmt: skip
HEAD = {"enableIngress", "headService", "rayStartParams", "serviceType", "template"}
WORKERS = {
    "groupName", "idleTimeoutSeconds", "maxReplicas", "minReplicas", "numOfHosts",
    "rayStartParams", "replicas", "scaleStrategy", "suspend", "template",
}  # fmt: skip
CONTAINER = {
    "args", "command", "env", "envFrom", "image", "imagePullPolicy", "lifecycle", "name", "ports",
    "resources", "securityContext", "volumeMounts", "workingDir",
}  # fmt: skip
#: Long options of sbatch, by its manual (Slurm 25.05), which one may want for such a job.
SBATCH = {
    "account", "array", "begin", "chdir", "comment", "constraint", "cpus-per-gpu", "cpus-per-task",
    "dependency", "error", "exclude", "exclusive", "export", "gpu-bind", "gpus", "gpus-per-node",
    "gpus-per-task", "gres", "hint", "job-name", "kill-on-invalid-dep", "mail-type", "mail-user",
    "mem", "mem-per-cpu", "mem-per-gpu", "no-kill", "no-requeue", "nodelist", "nodes", "ntasks",
    "ntasks-per-node", "open-mode", "output", "partition", "qos", "requeue", "reservation",
    "signal", "switches", "time", "time-min", "wait-all-nodes",
}  # fmt: skip


def manifests() -> list[Any]:
    yaml = pytest.importorskip("yaml", reason="PyYAML, which comes with Ray, is missing")
    return [yaml.safe_load(block.text) for block in blocks(PAGE, "yaml")]


def unknown(manifest: Mapping[str, Any]) -> set[str]:
    """Fields of a RayJob that its API does not have."""
    found = manifest.keys() - {"apiVersion", "kind", "metadata", "spec"}
    found |= manifest["spec"].keys() - JOB
    cluster = manifest["spec"]["rayClusterSpec"]
    found |= cluster.keys() - CLUSTER
    groups = [
        (cluster["headGroupSpec"], HEAD),
        *((g, WORKERS) for g in cluster["workerGroupSpecs"]),
    ]
    for group, fields in groups:
        found |= group.keys() - fields
        for container in group["template"]["spec"]["containers"]:
            found |= container.keys() - CONTAINER
    return found


def test_the_ray_job_has_the_fields_that_its_api_has() -> None:
    job, scrape = manifests()
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert unknown(job) == set()
    misspelt = {**job, "spec": {**job["spec"], "entryPoint": ""}}
    assert unknown(misspelt) == {"entryPoint"}
    assert scrape["scrape_configs"][0]["honor_labels"] is True


def test_other_pages_have_no_manifests() -> None:
    assert [page.stem for page in PAGES if blocks(page, "yaml")] == ["cluster"]


def test_the_batch_scripts_options_are_sbatchs() -> None:
    (script,) = blocks(PAGE, "bash")
    given = re.findall(r"^#SBATCH +--([\w-]+)", script.text, re.MULTILINE)
    assert len(given) >= 5
    assert set(given) <= SBATCH


def test_the_ray_job_fits_together() -> None:
    spec = manifests()[0]["spec"]
    cluster = spec["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    assert wrong_in_command(spec["entrypoint"]) == []
    words = spec["entrypoint"].split()
    assert int(words[words.index("--nodes") + 1]) == workers["replicas"]
    (worker,) = workers["template"]["spec"]["containers"]
    assert words[words.index("--nproc") + 1] == worker["resources"]["limits"]["nvidia.com/gpu"]
    port = int(words[words.index("--metrics-port") + 1])
    assert port in [p["containerPort"] for p in worker["ports"]]
    assert "/dev/shm" in [m["mountPath"] for m in worker["volumeMounts"]]
    params = [cluster["headGroupSpec"]["rayStartParams"], workers["rayStartParams"]]
    assert all(isinstance(v, str) for p in params for v in p.values()), "the API takes strings"
    for group in (cluster["headGroupSpec"], workers):
        pod = group["template"]["spec"]
        mounted = {m["name"] for c in pod["containers"] for m in c["volumeMounts"]}
        assert mounted == {v["name"] for v in pod["volumes"]}


#: Stands in for srun, ray, python and ftkit: notes how it was called, and does what its own file says.
STAND_IN = """#!/bin/bash
echo "${0##*/} $*" >> "$CALLS"
"""


class Slurm:
    """The batch script of the page in an allocation of four nodes that is not there."""

    def __init__(self, folder: Path, *, joined: bool = True, ftkit: str = "exit 7") -> None:
        self.calls = folder / "calls"
        self.calls.touch()
        does = {"srun": "", "ray": "", "python": f"exit {int(not joined)}", "ftkit": ftkit}
        for name, body in does.items():
            path = folder / name
            path.write_text(f"{STAND_IN}{body}\n")
            path.chmod(path.stat().st_mode | stat.S_IXUSR)
        (script,) = blocks(PAGE, "bash")
        self.script = folder / "job.sh"
        self.script.write_text(script.text)
        self.environ = os.environ | {
            "PATH": f"{folder}:{os.environ['PATH']}",
            "CALLS": str(self.calls),
            "SCRATCH": "/scratch",
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NUM_NODES": "4",
        }

    def start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(["bash", str(self.script)], env=self.environ)

    def called(self, name: str) -> list[str]:
        return [c for c in self.calls.read_text().splitlines() if c.startswith(f"{name} ")]


@pytest.mark.multiproc
def test_the_batch_script_makes_a_cluster_and_ends_with_the_jobs_code(tmp_path: Path) -> None:
    slurm = Slurm(tmp_path)
    with slurm.start() as process:
        assert process.wait(timeout=30) == 7
    start, stop = slurm.called("ray")
    assert "--head --port=24711" in start
    assert stop == "ray stop"
    (workers,) = slurm.called("srun")
    assert "--nodes=3 --ntasks=3 ray start --address=" in workers
    assert ":24711 --block" in workers
    (run,) = slurm.called("ftkit")
    assert run.startswith("ftkit run --engine ray --nodes 4 --nproc 8 ")
    assert "--run-dir /scratch/runs/4711 train.py" in run


@pytest.mark.multiproc
def test_a_batch_script_whose_nodes_do_not_come_runs_nothing(tmp_path: Path) -> None:
    slurm = Slurm(tmp_path, joined=False)
    with slurm.start() as process:
        assert process.wait(timeout=30) == 1
    assert slurm.called("ftkit") == []


@pytest.mark.multiproc
def test_slurms_signal_reaches_the_job_which_may_take_its_time(tmp_path: Path) -> None:
    last_words = """
trap 'sleep 0.3; echo "ftkit wrote its checkpoint" >> "$CALLS"; exit 143' TERM
echo "ftkit waits" >> "$CALLS"
while :; do sleep 0.05; done
"""
    slurm = Slurm(tmp_path, ftkit=last_words)
    with slurm.start() as process:
        deadline = time.monotonic() + 30
        while "ftkit waits" not in slurm.called("ftkit"):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 143
    assert slurm.called("ftkit")[-1] == "ftkit wrote its checkpoint"
    assert slurm.called("ray")[-1] == "ray stop", "after the job has ended"
