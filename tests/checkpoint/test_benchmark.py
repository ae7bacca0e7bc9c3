import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import parity
from ftkit.checkpoint.arena import SHM
from ftkit.checkpoint.erasure import Codec


@pytest.mark.multiproc
def test_the_snapshot_benchmark_runs_small(tmp_path):
    out = tmp_path / "result.json"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.snapshot"),
            *("--params", "20000", "--steps", "2", "--rounds", "1", "--json", str(out)),
        ],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
        timeout=90,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["modes"].keys() == {"none", "capture", "dcp", "dcp-kept"}
    assert result["bytes"] > 20000 * 12
    assert result["capture_to_dcp"] > 0
    assert "dcp-kept" in done.stdout.splitlines()[-1]
    assert not list(SHM.glob("ftkit-snapshot-*"))


def test_the_parity_benchmark_runs_small():
    found = parity.measure(64 << 10, 1, [(2, 1), (3, 2), (2, 3)])
    assert not found.problems
    assert all(figure.value for figure in found.figures)
    # The parity is part of the format: these bytes may never change.
    assert found.computed == {"CRC-32 of all parity": "b63c006a"}


def test_the_parity_benchmark_notices_wrong_bytes(monkeypatch):
    right = Codec.rebuild

    def wrong(self, shards, lost):
        right(self, shards, lost)
        lost[0][0] ^= 1

    monkeypatch.setattr(Codec, "rebuild", wrong)
    found = parity.measure(64 << 10, 1, [(2, 1)])
    assert any("rebuild 2+1 gave wrong bytes" in problem for problem in found.problems)
