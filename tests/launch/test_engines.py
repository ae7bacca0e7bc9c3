"""Both engines against one contract, and what only Ray does."""

import io
import json
import os
import re
import socket
import subprocess
import sys
import textwrap
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ftkit.core import exit_codes
from ftkit.core.errors import CapacityError, UsageError
from ftkit.core.trace import read_run
from ftkit.launch.arenas import sweep
from ftkit.launch.config import JobConfig
from ftkit.launch.embedded import EmbeddedEngine
from ftkit.launch.engine import Engine
from ftkit.launch.ray_actors import rank_inheritance
from ftkit.launch.ray_placement import AGENT_CPUS, bundle, parse_resources, shortage, strategy
from ftkit.launch.store_drills import OnDisk
from ftkit.launch.tail import RankOutput
from tests.drills.jobs import TRAINING, run
from tests.launch.engine_contract import PACED, WAIT, EngineContract, Jobs, drive, leftovers
from tests.launch.ray_cluster import ROOT, Cluster, free_port, running_cluster

CLI = (sys.executable, "-m", "ftkit.launch.cli")


@pytest.mark.multiproc
class TestEmbedded(EngineContract):
    def make(self, config: JobConfig, secret: str) -> Engine:
        return EmbeddedEngine(config, secret)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running_cluster("ray") as cluster:
        yield cluster


@contextmanager
def command_in(folder: Path, cluster: Cluster, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """`ftkit run` on the cluster, with one rank that waits."""
    (folder / "train.py").write_text(textwrap.dedent(WAIT))
    command = [*CLI, "run", "--engine", "ray", *options, "train.py", str(folder)]
    environ = cluster.environ | {"RAY_ADDRESS": cluster.address}
    with subprocess.Popen(command, cwd=folder, env=environ) as process:
        try:
            deadline = time.monotonic() + 60
            while not (folder / "up0").exists():
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)
            yield process
        finally:
            process.kill()


@pytest.mark.ray
@pytest.mark.multiproc
class TestRay(EngineContract):
    @pytest.fixture(autouse=True)
    def connected(self, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        yield
        deadline = time.monotonic() + 20
        while cluster.actors() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert cluster.actors() == []

    def make(self, config: JobConfig, secret: str) -> Engine:
        from ftkit.launch.ray_engine import RayEngine

        return RayEngine(config, secret)

    def test_a_clusters_url_is_not_its_address(
        self, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
        with pytest.raises(UsageError, match=r"http://127.0.0.1:8265, which is not .* job submit"):
            jobs.start(WAIT)

    def test_a_cluster_that_is_not_there_is_named_at_once(
        self, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        port = free_port()
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
        with pytest.raises(UsageError, match=f"no Ray cluster answers at 127.0.0.1:{port} .*start"):
            jobs.start(WAIT)

    def test_a_coordinator_killed_twice_is_no_error(self, jobs: Jobs) -> None:
        engine = jobs.start(WAIT)
        jobs.pids(1)
        engine.kill_coordinator()
        engine.kill_coordinator()
        (jobs.folder / "go").touch()
        assert drive(engine).code == 0

    def test_sigterm_to_the_command_ends_the_job_in_order(
        self, cluster: Cluster, tmp_path: Path
    ) -> None:
        with command_in(tmp_path, cluster, "--no-preload") as process:
            process.terminate()
            assert process.wait(timeout=30) == 143
        (run,) = (tmp_path / "runs").iterdir()
        assert leftovers(run.name, wait_s=0.0) == []

    def test_nothing_is_left_of_a_job_whose_command_is_killed(
        self, cluster: Cluster, tmp_path: Path
    ) -> None:
        with command_in(tmp_path, cluster) as process:
            process.kill()
        (run,) = (tmp_path / "runs").iterdir()
        deadline = time.monotonic() + 20
        while cluster.actors() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert [x for x in leftovers(run.name) if x.startswith("process")] == []
        sweep(Path("/dev/shm"))  # as the next job's agent does
        assert leftovers(run.name) == []

    def test_ray_job_submit_runs_a_script_of_the_working_directory(
        self, cluster: Cluster, tmp_path: Path
    ) -> None:
        (tmp_path / "beside.py").write_text("WORD = 'from beside'\n")
        (tmp_path / "train.py").write_text(
            "import beside, os, sys\nprint(beside.WORD, os.environ['RANK'], sys.argv[1], flush=True)"
        )
        url = f"http://127.0.0.1:{cluster.dashboard}"
        command = ["ray", "job", "submit", "--address", url, "--working-dir", str(tmp_path), "--"]
        done = subprocess.run(
            [*command, *CLI, "run", "--nproc", "2", "--no-preload", "train.py", "an argument"],
            env=cluster.environ,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "from beside 0 an argument" in done.stdout
        assert "from beside 1 an argument" in done.stdout

    def test_a_node_is_lost_and_parity_and_checkpoints_go_on(self, tmp_path: Path) -> None:
        # As many as the first checkpoint may take on a busy machine.
        disk, lost, steps = tmp_path / "disk", list[int](), 480

        def poll(engine: Engine) -> None:
            if not lost and {"parity", "checkpoint"} <= {e["kind"] for e in read_run(folder)}:
                lost.append(max(e["step"] for e in read_run(folder) if e["kind"] == "commit"))
                engine.kill_node(1)

        folder = tmp_path / "run"
        done = run(
            folder,
            TRAINING,
            [str(steps)],
            nodes=2,
            nproc=1,
            settings={
                "parity": "1+1",
                "checkpoint_dir": str(disk),
                "checkpoint_every": 20,
                "checkpoint_keep": "last:2",
            },
            on_poll=poll,
            engine="ray",
        )
        assert done.stop.code == 0, f"{done.stop.reason}\n{done.log}"
        ((before,), after) = lost, {e["generation"] for e in done.of("commit")}
        assert before < steps
        assert len(after) > 1
        assert min(e["step"] for e in done.of("commit") if e["generation"] == max(after)) > before
        assert len({e["generation"] for e in done.of("parity")}) > 1, "parity goes on"
        assert max(e["step"] for e in done.of("checkpoint")) == steps
        assert len(done.params) == 1
        held = OnDisk.read(disk)
        assert held.good[-1] == steps
        assert not held.damaged

    @pytest.mark.timeout(240)  # a second raylet, and a cluster that is busy for it
    def test_a_node_that_ray_drains_loses_no_step(self, cluster: Cluster, tmp_path: Path) -> None:
        """Two machines; that of one rank is about to go, and its rank leaves between two steps."""
        import ray

        script = tmp_path / "train.py"
        script.write_text(textwrap.dedent(PACED))
        folder, drained = tmp_path / "run", dict[str, float]()

        def poll(engine: Any) -> None:
            if drained or not any(
                e["kind"] == "commit" and e["step"] > 2 for e in read_run(folder)
            ):
                return
            here = ray.get_runtime_context().get_node_id()
            (there,) = {engine._node_id(node) for node in (0, 1)} - {here}
            drained[there] = time.monotonic()
            cluster.drain(there)

        with cluster.machine():
            done = run(folder, script, ["200"], nodes=2, nproc=1, on_poll=poll, engine="ray")
        assert done.stop.code == 0, f"{done.stop.reason}\n{done.log}"
        (at,) = drained.values()
        left = [e for e in done.of("left") if e["mono"] > at]
        assert len(left) == 1, f"the rank left by itself: {left}"
        undone = [
            e
            for kind in ("report", "rollback", "halt")
            for e in done.of(kind)
            if at < e["mono"] <= left[0]["mono"]
        ]
        assert undone == [], "nobody stood still for it"
        votes = {(e["step"], e["generation"]): 0 for e in done.of("commit")}
        assert sorted(step for step, _ in votes) == list(range(1, 201)), "no step was played twice"
        assert len(done.params) == 1

    def test_metrics_of_a_job_are_where_ray_has_its_own(self, jobs: Jobs) -> None:
        import ray

        engine = jobs.start(WAIT)
        jobs.pids(1)
        (machine,) = [n for n in ray.nodes() if n["Alive"]]
        url = f"http://127.0.0.1:{machine['MetricsExportPort']}/metrics"
        wanted = rf'^ray_ftkit_rank_starts_total{{.*job="{jobs.configs[0].job}".*}} 1\.0$'
        deadline = time.monotonic() + 60  # Ray passes on what it has every ten seconds
        while not re.search(wanted, said := told(url), re.MULTILINE):
            assert engine.poll() is None
            assert time.monotonic() < deadline, said
            time.sleep(0.5)
        assert re.search(r"^ray_ftkit_info{.*} 1\.0$", said, re.MULTILINE)
        (jobs.folder / "go").touch()
        assert drive(engine).code == 0

    def test_what_no_machine_has_is_named(self, jobs: Jobs) -> None:
        settings: dict[str, Any] = {"resources": "lamp=1", "placement_s": 1.0}
        with pytest.raises(
            CapacityError, match=r"no room .*: no machine .* has lamp: they have CPU"
        ):
            jobs.start(WAIT, **settings)

    @pytest.mark.timeout(240)  # a second raylet, and a cluster that is busy for it
    def test_a_job_waits_for_a_machine_that_has_what_it_books(
        self, cluster: Cluster, tmp_path: Path
    ) -> None:
        from ray.autoscaler.v2.sdk import get_cluster_status

        (tmp_path / "train.py").write_text(
            "import os; print('sees', os.environ['CUDA_VISIBLE_DEVICES'], flush=True)"
        )
        command = [*CLI, "run", "--engine", "ray", "--no-preload"]
        command += ["--resources", "lamp=1,GPU=2", "train.py"]
        with subprocess.Popen(
            command,
            cwd=tmp_path,
            env=cluster.environ | {"RAY_ADDRESS": cluster.address},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as job:
            try:
                deadline, pending = time.monotonic() + 60, list[Any]()
                while not pending:  # what Ray's autoscaler goes by
                    assert job.poll() is None
                    assert time.monotonic() < deadline
                    time.sleep(0.5)
                    status = get_cluster_status(cluster.address)
                    pending = status.resource_demands.placement_group_demand
                assert "lamp" in str(pending[0])
                with cluster.machine("--num-gpus=2", '--resources={"lamp": 1}'):
                    out, err = job.communicate(timeout=100)
            finally:
                job.kill()
        assert job.returncode == 0, out + err
        assert "sees 0,1" in out
        assert "has lamp" in err

    def test_a_drill_programme_takes_a_node_of_a_running_job(self, tmp_path: Path) -> None:
        folder, script, told = tmp_path / "run", tmp_path / "train.py", tmp_path / "told"
        script.write_text(textwrap.dedent(PACED))
        command = [*CLI, "drill", "plan", str(folder), "--once", "--fault", "lose-node", "--json"]
        command += ["--steps-between", "3", "--history", str(tmp_path / "drills.jsonl")]
        started = list[subprocess.Popen[bytes]]()

        def poll(engine: Engine) -> None:
            if not started and any(e["kind"] == "commit" for e in read_run(folder)):
                environ = os.environ | {"PYTHONPATH": str(ROOT)}
                with told.open("wb") as out:
                    started.append(subprocess.Popen(command, stdout=out, env=environ))
            elif started and started[0].poll() is not None:
                engine.interrupt()

        try:
            done = run(folder, script, ["2000"], nodes=2, nproc=1, on_poll=poll, engine="ray")
        finally:
            for programme in started:
                programme.kill()
                programme.wait()
        assert done.stop.code == exit_codes.INTERRUPTED, f"{done.stop.reason}\n{done.log}"
        record = json.loads(told.read_text())
        assert (record["outcome"], record["reason"]) == ("survived", "")
        assert (record["fault"], record["engine"], record["nodes"]) == ("lose-node", "ray", 2)
        for name in ("steps_lost", "slots_lost", "slots_doubled", "others_lost"):
            assert record[name] == 0
        # Its agent is another process, which has started another rank.
        (struck,) = record["seats"]
        assert len({e["pid"] for e in done.of("spawn") if e["seat"] == struck}) == 2


@pytest.mark.ray
@pytest.mark.multiproc
def test_a_peer_that_says_nothing_is_given_up_on(tmp_path: Path) -> None:
    sooner = "from ftkit.launch import cli, ray_engine; ray_engine.CONNECT_S = 2.0; cli.main()"
    (tmp_path / "train.py").touch()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        done = subprocess.run(
            [sys.executable, "-c", sooner, "run", "--engine", "ray", "train.py"],
            cwd=tmp_path,
            env=os.environ | {"RAY_ADDRESS": f"127.0.0.1:{port}", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 64
    assert f"the Ray cluster at 127.0.0.1:{port} said nothing for 2 s" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_gpu_is_booked_for_each_rank_only_where_there_are_enough() -> None:
    cpu_only = {"CPU": AGENT_CPUS}
    assert bundle([machine()], nodes=1, nproc=2) == cpu_only
    assert bundle([machine(GPU=4.0)], nodes=2, nproc=2) == cpu_only | {"GPU": 2}
    assert bundle([machine(GPU=1.0), machine(GPU=1.0)], nodes=1, nproc=2) == cpu_only
    assert bundle([machine(GPU=8.0), machine()], nodes=2, nproc=8) == cpu_only


@pytest.mark.parametrize("text", ["GPU", "GPU=", "=1", "GPU=x", "GPU=0", "GPU=nan", "GPU=1,GPU=2"])
def test_resources_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"--resources has .* write it as in"):
        JobConfig(job="a", command=("x",), resources=text)
    assert parse_resources("GPU=8, lamp=0.5") == {"GPU": 8.0, "lamp": 0.5}
    assert bundle([], nodes=1, nproc=2, wanted={"GPU": 8.0}) == {"CPU": AGENT_CPUS, "GPU": 8.0}


def test_what_a_cluster_lacks_is_said() -> None:
    alive = [machine(GPU=8.0), machine(GPU=4.0, **{"node:10.0.0.1": 1.0})]

    def lacking(shape: dict[str, float], nodes: int, how: str = "SPREAD") -> str:
        return shortage(alive, shape, nodes=nodes, how=how)

    assert lacking({"TPU": 1.0}, 1) == "no machine of the cluster has TPU: they have CPU, GPU"
    assert lacking({"GPU": 9.0}, 1) == "no machine of the cluster has 9 GPU: the most of one is 8"
    assert lacking({"GPU": 4.0}, 3) == ""
    said = lacking({"GPU": 4.0}, 3, "STRICT_SPREAD")
    assert said == "the cluster has room for 2 of 3 nodes of GPU=4, each on a machine of its own"
    assert "for 3 of 4 nodes" in lacking({"GPU": 4.0}, 4)


def test_nodes_are_apart_where_there_are_machines_for_it() -> None:
    assert strategy("auto", nodes=2, alive=2) == "STRICT_SPREAD"
    assert strategy("auto", nodes=2, alive=1) == strategy("auto", nodes=1, alive=4) == "SPREAD"
    assert strategy("strict-spread", nodes=2, alive=1) == "STRICT_SPREAD"


def machine(**resources: float) -> dict[str, Any]:
    return {"Resources": {"CPU": 8.0, **resources}}


def test_ranks_inherit_the_drivers_environment_and_the_nodes_devices() -> None:
    node = {"CUDA_VISIBLE_DEVICES": "2,3", "HOSTNAME": "b", "RAY_JOB_ID": "1", "ON_NODE": "x"}
    node["PYTHONBREAKPOINT"] = "ray.util.rpdb.set_trace"
    driver = {"CUDA_VISIBLE_DEVICES": "0", "HOSTNAME": "a", "RAY_ADDRESS": "c:1", "MINE": "y"}
    assert rank_inheritance(node, driver) == {
        "CUDA_VISIBLE_DEVICES": "2,3",
        "HOSTNAME": "b",
        "ON_NODE": "x",
        "MINE": "y",
    }


def test_rank_output_passes_on_whole_lines_once(tmp_path: Path) -> None:
    log = tmp_path / "seat-1.log"
    log.write_text("of an earlier run\n")
    out = io.BytesIO()
    output = RankOutput(tmp_path, 2, out)
    with log.open("a") as file:
        print("one\ntw", end="", file=file, flush=True)
        output.pass_on()
        assert out.getvalue() == b"one\n"
        print("o\nthree", end="", file=file, flush=True)
        output.pass_on()
    output.pass_on(all_of_it=True)
    output.pass_on(all_of_it=True)
    assert out.getvalue() == b"one\ntwo\nthree"


def told(url: str) -> str:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            text: str = answer.read().decode()
            return text
    except OSError as error:
        return str(error)
