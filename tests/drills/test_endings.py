"""Jobs that cannot go on: each ends by itself, soon, with a code and words that help."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from ftkit.core import exit_codes
from ftkit.core.fault_plan import Kind, Point
from tests.drills.jobs import HERE, Run, fault, run

pytestmark = pytest.mark.multiproc

SCRIPTS = HERE / "scripts.py"


def spawned(done: Run) -> int:
    return len(done.of("spawn"))


def test_a_script_that_ends_before_it_joins_is_not_tried_again(tmp_path: Path) -> None:
    done = run(tmp_path / "run", SCRIPTS, ["early"], settings={"preload": False})
    assert done.stop.code == 3
    assert "exited with 3 before it joined the job" in done.stop.reason
    assert spawned(done) == 2


def test_the_same_exception_three_times_ends_the_job_with_its_words(tmp_path: Path) -> None:
    done = run(tmp_path / "run", SCRIPTS, ["bug"])
    assert done.stop.code == 1
    assert "seat 0 failed 3 times at or near step 4 " in done.stop.reason
    assert max(e["step"] for e in done.of("commit")) == 3
    assert "ZeroDivisionError: the same every time" in done.stop.reason
    # Rank 0 raises, and whoever is rank 0 without it: seat 0 three times, seat 1 twice.
    assert spawned(done) <= 6


def test_what_no_retry_can_mend_is_not_tried_again(tmp_path: Path) -> None:
    done = run(tmp_path / "run", SCRIPTS, ["sharded"])
    assert done.stop.code == exit_codes.USAGE
    assert "give the loader no rank-dependent sampler" in done.stop.reason
    assert spawned(done) == 2


def test_a_shuffling_loader_is_read_alike_by_all_and_by_a_newcomer(tmp_path: Path) -> None:
    faults = [fault(Kind.KILL, Point.FORWARD, 1, 5)]
    done = run(tmp_path / "run", SCRIPTS, ["shuffled"], faults=faults)
    assert done.stop.code == 0, done.stop.reason
    assert not done.of("refused")


@pytest.mark.skipif(os.getuid() != 0, reason="mounting needs root")
def test_too_little_shared_memory_is_told_in_bytes(tmp_path: Path) -> None:
    tiny = tmp_path / "shm"
    tiny.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(tiny)], capture_output=True,
        check=False,
    )  # fmt: skip
    if mounted.returncode:
        pytest.skip("this machine does not let us mount")
    try:
        done = run(tmp_path / "run", SCRIPTS, ["huge"], shm_root=tiny)
    finally:
        subprocess.run(["umount", str(tiny)], check=True)
    assert done.stop.code == exit_codes.USAGE
    assert re.search(r"\d+ bytes free \(\d+ too few\)", done.stop.reason)
    assert spawned(done) <= 2
