import json
import subprocess
import sys
from pathlib import Path

import pytest

from ftkit.checkpoint.arena import SHM


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
