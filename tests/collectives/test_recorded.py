"""gloo groups of a script that knows nothing of ftkit tell of their collectives."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.multiproc


def test_all_that_torch_does_with_gloo_is_recorded_alike_on_all_ranks(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "tests.collectives.recorded_job"]
    ranks = [
        subprocess.Popen([*command, str(tmp_path / "store"), str(rank)], stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    for rank in ranks:
        _, errors = rank.communicate(timeout=120)
        assert rank.returncode == 0, errors.decode()
    first, second = (json.loads((tmp_path / f"store-{r}").read_text()) for r in range(2))
    assert first["entered"] == second["entered"]
    assert first["backend"] == ["gloo", "gloo"]
    for told in (first, second):
        assert sorted(told["left"]) == sorted(entry[:2] for entry in told["entered"])
    ops = [op for group, _, op, _ in first["entered"] if group == 0]
    assert ops[:2] == ["all_reduce sum float32", "all_reduce max float32"]
    assert "reduce_scatter avg float32" in ops  # FSDP2's, from C++
    assert ops.count("all_reduce sum float32") > 2  # DDP's too
    (sub,) = {group for group, *_ in first["entered"]} - {0}
    assert [e[1:] for e in first["entered"] if e[0] == sub] == [[0, "all_reduce sum float32", 32]]
    seqs = [seq for group, seq, *_ in first["entered"] if group == 0]
    assert seqs == list(range(len(seqs)))
