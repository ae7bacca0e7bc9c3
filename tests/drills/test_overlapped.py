"""Ranks die inside overlapped operations under a session: the step is played again by the others."""

from pathlib import Path

import pytest
import torch

from ftkit.core.fault_plan import Kind, Point
from tests.drills.jobs import HERE, fault, run
from tests.drills.overlapped import DEATHS, SEATS, STEPS, trained

pytestmark = pytest.mark.multiproc


def test_deaths_in_a_linear_an_attention_and_a_woven_stack(tmp_path: Path) -> None:
    # And one dies when all have played their slots, which a survivor would otherwise keep.
    faults = [fault(Kind.KILL, Point.ALL_REDUCE, 4, 3)]
    done = run(tmp_path / "run", HERE / "overlapped.py", nproc=SEATS, faults=faults, max_stall_s=8)
    assert done.stop.code == 0, f"{done.stop}\n{done.log}"
    assert {e["seat"]: (e["step"], e["where"]) for e in done.of("doomed")} == DEATHS
    assert {e["seat"] for e in done.of("exit") if e["signal"] == 9} == {*DEATHS, 4}
    rolled = {e["step"] for e in done.of("rollback")}
    assert {step for step, _ in DEATHS.values()} <= rolled, "each was played again"
    ends = [e["values"] for e in done.of("parameters")]
    assert ends
    assert all(values == ends[0] for values in ends), "all ranks hold the same"
    for got, wanted in zip(ends[0], trained(), strict=True):
        mine = torch.tensor(got, dtype=torch.float64)
        torch.testing.assert_close(mine, wanted.flatten(), rtol=1e-9, atol=1e-12)
    assert max(e["step"] for e in done.of("commit")) == STEPS
