"""The checks of a node: what they find here, and what they make of a machine that is ill."""

import itertools
import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from ftkit.detection.node_health import Check, Health, NodeResult
from ftkit.launch import preflight, self_check
from ftkit.launch.cli import main


def test_this_machine_multiplies_and_remembers() -> None:
    gemm, memory = self_check.gemm(), self_check.memory()
    assert gemm.health is memory.health is Health.OK, (gemm, memory)
    assert gemm.digest == self_check.PRODUCT


def test_a_wrong_product_and_a_lost_byte_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_check, "PRODUCT", "other")
    assert self_check.gemm().health is Health.FAILED
    copy = np.copyto

    def lossy(there, here):
        copy(there, here)
        there[12344:12346] ^= 4  # of one word

    monkeypatch.setattr(np, "copyto", lossy)
    found = self_check.memory()
    assert found.health is Health.FAILED
    assert "10 bytes" in found.note, "four patterns and the addresses, two bytes each"


def test_folders_that_are_not_there_and_too_small_are_failures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert preflight.shared_memory(tmp_path / "none").health is Health.FAILED
    assert preflight.disk(tmp_path / "none").health is Health.FAILED
    good = preflight.disk(tmp_path)
    assert good.health is Health.OK
    assert good.value
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(preflight, "FREE_BYTES_MIN", 1 << 62)
    assert "--shm-size" in preflight.shared_memory(tmp_path).note
    assert preflight.disk(tmp_path).health is Health.FAILED


def test_a_clock_that_goes_back_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    assert preflight.clock().health is Health.OK
    stamps = iter([*range(500), *range(400, 900)])
    monkeypatch.setattr(preflight.time, "monotonic_ns", lambda: next(stamps))  # type: ignore[attr-defined]
    assert "went back" in preflight.clock().note


def test_a_clock_read_late_is_no_drift_and_one_that_drifts_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read, reads = time.time, itertools.count()

    def put_off() -> float:
        now = read()
        if next(reads) == 0:
            time.sleep(0.01)  # off its core between two readings
        return now

    monkeypatch.setattr(preflight.time, "time", put_off)  # type: ignore[attr-defined]
    assert preflight.clock().health is Health.OK
    zero = read()
    monkeypatch.setattr(preflight.time, "time", lambda: zero + 1.5 * (read() - zero))  # type: ignore[attr-defined]
    assert preflight.clock().health is Health.FAILED


def test_a_disk_is_read_back_and_not_its_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = list[str]()
    sync, advise = os.fsync, os.posix_fadvise

    def noted_sync(fd: int) -> None:
        done.append("sync")
        sync(fd)

    def noted_advice(fd: int, offset: int, length: int, advice: int) -> None:
        done.append(f"drop {advice}")
        advise(fd, offset, length, advice)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(os, "posix_fadvise", noted_advice)
    assert preflight.disk(tmp_path).health is Health.OK
    assert done == ["sync", f"drop {os.POSIX_FADV_DONTNEED}"]


def test_a_torch_check_that_cannot_be_started_is_a_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(preflight.sys, "executable", "/no/such/python")  # type: ignore[attr-defined]
    [found] = preflight.torch_and_gpus()
    assert found.health is Health.FAILED
    assert "could not be started" in found.note


def test_a_history_is_kept_compared_and_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "KEPT", 4)
    path = tmp_path / "deep" / "nodes.jsonl"

    def found(speed: float) -> NodeResult:
        check = Check(name="disk", health=Health.OK, value=speed, unit="MB/s")
        return NodeResult(node="a", at=1.0, checks=(check,))

    assert preflight.compared(found(100.0), None) == found(100.0)
    for _ in range(3):
        assert preflight.compared(found(100.0), path).checks[0].health is Health.OK
    with path.open("a") as file:
        file.write('{"node": "a", "at"')  # whoever wrote that died
        file.write("\n")
    assert preflight.compared(found(80.0), path).checks[0].health is Health.WARNING
    assert preflight.read_history(path)[-1] == found(80.0), "kept as it was found"
    for _ in range(6):
        preflight.compared(found(100.0), path)
    assert len(preflight.read_history(path)) <= 8


def test_the_command_says_what_it_found(tmp_path: Path) -> None:
    arguments = ["doctor", "--no-torch", "--disk", str(tmp_path), "--history", str(tmp_path / "h")]
    told = json.loads(CliRunner().invoke(main, [*arguments, "--json"]).stdout)
    names = [c["name"] for c in told["checks"]]
    assert names == ["cpu", "gemm", "memory", "shm", "disk", "network", "clock"]
    assert len((tmp_path / "h").read_text().splitlines()) == 1
    shown = CliRunner().invoke(main, [*arguments, "--shm-root", str(tmp_path / "none")])
    assert shown.exit_code == 1
    assert "should carry no job" in shown.stdout
    no_file = CliRunner().invoke(main, [*arguments[:-1], str(tmp_path)])
    assert (no_file.exit_code, f"--history {tmp_path} cannot be" in no_file.stderr) == (64, True)
    file = CliRunner().invoke(main, ["doctor", "--no-torch", "--disk", str(tmp_path / "h")])
    assert (file.exit_code, "is no folder" in file.stderr) == (64, True)
    assert CliRunner().invoke(main, ["doctor", "--help"]).exit_code == 0


@pytest.mark.multiproc
def test_two_processes_reduce_by_torch() -> None:
    found = {c.name: c for c in preflight.torch_and_gpus()}
    assert found["torch"].health is Health.OK, found["torch"].note


def test_a_torch_that_ends_early_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight.sys, "executable", "/bin/false")  # type: ignore[attr-defined]
    [found] = preflight.torch_and_gpus()
    assert found.health is Health.FAILED
    assert "ended early" in found.note
