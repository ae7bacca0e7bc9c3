"""Every benchmark, run small: it ends well, says what it computed, and leaves nothing behind."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks import against_torchft
from benchmarks.jobs import ROOT, scratch
from benchmarks.wires import Wires
from ftkit.launch.arenas import OWNER

pytestmark = pytest.mark.multiproc

SMALLEST = ["--mib", "1", "--rounds", "1", "--positions", "8"]

#: As small as it gets; the machine may be busy.
SMALL = {
    "repair": ["--worlds", "2", "--runs", "1", "--gap", "20", "--step-s", "0", "--slots", "2"],
    "spares": ["--nproc", "2", "--runs", "1", "--gap", "20", "--step-s", "0"],
    "first_steps": ["--quick", "--runs", "1"],
    "hang": ["--worlds", "2", "--runs", "1", "--gap", "20", "--kinds", "hang", "--slots", "2"],
    "drills": ["--count", "1", "--seed", "19", "--nproc", "2", "--steps", "20"],
    "step_time": [
        *("--models", "4m", "--worlds", "2"),
        *("--rounds", "1", "--steps", "6", "--warm", "2"),
    ],
    "respawn": ["--nproc", "2", "--rounds", "1", "--kills", "1", "--gap", "90"],
    "collectives": [
        *("--only", "bandwidth", "kill", "--worlds", "2", "--sizes", "65536"),
        *("--blocks", "1", "--kills", "1"),
    ],
    "exits": ["--gigabytes", "0.05", "--kills", "1"],
    "persist": ["--mib", "1", "--rounds", "1"],
    "rings": ["--megabytes", "2", "--rounds", "1"],
    "quantized": ["--worlds", "2", "--repetitions", "1"],
    "kills": ["--quick", "--kills", "2", "--nproc", "3"],
    "churn": ["--minutes", "0.25", "--seed", "1"],
    "snapshot": [*SMALLEST, "--steps", "1", "--without"],
    "every_step": [*SMALLEST, "--steps", "1", "--without"],
    "restore": ["--mib", "4", "--rounds", "1"],
    "survival": [
        *("--losses", "5", "--kills", "2", "--places", "12"),
        *("--writers", "4", "--dcp", "1"),
    ],
    "policy": ["--days", "2", "--histories", "1"],
    "capture": ["--mib", "1", "--rounds", "1"],
    "scale": ["--sizes", "64", "128", "--steps", "2", "--faults", "1"],
    "simulation": ["--seeds", "20", "--large", "1", "--ranks", "50"],
    "detection": [
        *("--trials", "1", "--rank-steps", "1e6", "--repetitions", "1", "--sizes", "50"),
    ],
}


def start(name: str, tmp: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", f"benchmarks.{name}", *SMALL[name], *arguments],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run(name: str, tmp: Path, *arguments: str) -> dict[str, Any]:
    process = start(name, tmp, *arguments)
    try:
        out, errors = process.communicate(timeout=110)
    finally:
        if process.poll() is None:
            process.terminate()
            process.communicate(timeout=20)
    assert process.returncode == 0, errors[-2000:]
    (line,) = out.splitlines()
    told: dict[str, Any] = json.loads(line)
    return told


@pytest.mark.parametrize("name", sorted(SMALL))
def test_a_benchmark_runs_small(name: str, tmp_path: Path) -> None:
    if name == "rings" and not Wires.available():
        pytest.skip("network namespaces need root")
    kept = tmp_path / "kept"
    scratch_folder = tmp_path / "tmp"
    scratch_folder.mkdir()
    told = run(name, scratch_folder, "--json", "--save", str(kept))
    assert told["benchmark"] == name
    assert told["problems"] == []
    for figure in told["figures"]:
        assert figure["value"] is not None, figure
        assert figure["value"] >= 0 or figure["goal"].startswith(">= -"), figure
    for what, value in told["computed"].items():
        assert value, what
    assert json.loads((kept / f"{name}.json").read_text()) == told
    assert f"| {name} |" in (kept / "README.md").read_text()
    assert not list(scratch_folder.glob("ftkit-*"))


def test_ftkits_side_and_plain_ddps_of_the_comparison_with_torchft(tmp_path: Path) -> None:
    options = argparse.Namespace(steps=30, tail=0, rows=8)
    ours = against_torchft.run_ftkit(tmp_path / "ftkit", options, kill_at=14, victim=1)
    plain = against_torchft.run_plain(tmp_path / "plain", options)
    assert ours.repair_s is not None
    assert ours.survivors_lost == 0
    assert len(ours.params) == len(plain.params) == 1
    found = against_torchft.report([ours, plain], set(ours.params), "not asked for", {})
    assert not found.problems


def test_a_benchmark_that_is_ended_leaves_no_process_and_no_file(tmp_path: Path) -> None:
    process = start("hang", tmp_path, "--json")
    try:
        deadline = time.monotonic() + 60
        family: list[psutil.Process] = []
        while not list(tmp_path.glob("*/hang-2/reference/events/seat-*")):
            assert time.monotonic() < deadline, "no rank came up"
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.05)  # a look at the files, not a wait for something unknown
        family = psutil.Process(process.pid).children(recursive=True)
        assert family
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=40)
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive
    assert not list(tmp_path.glob("ftkit-*"))
    left = [p for p in Path("/dev/shm").glob("ftkit-*") if _owner(p) in {c.pid for c in family}]
    assert not left


def test_scratch_is_removed_when_sigterm_comes(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(SystemExit) as ended, scratch("test"):  # noqa: PT012  # the signal is the test
        assert list(tmp_path.iterdir())
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)  # never slept to the end: the handler raises
    assert ended.value.code == 128 + signal.SIGTERM
    assert not list(tmp_path.iterdir())


def _owner(folder: Path) -> int | None:
    try:
        return int((folder / OWNER).read_text().split()[0])
    except (OSError, ValueError):
        return None
