"""User code hangs where a repair has just ended: it is named like a hang anywhere else."""

from pathlib import Path

import pytest

from ftkit.core.fault_plan import Kind, PlannedFault, Point
from tests.drills.hanging import SEATS
from tests.drills.jobs import HERE, run

pytestmark = pytest.mark.multiproc


def test_who_hangs_right_after_a_repair_is_named_and_replaced(tmp_path: Path) -> None:
    dies = PlannedFault(kind=Kind.KILL, point=Point.FORWARD, seat=2, member=2, step=20)
    done = run(tmp_path, HERE / "hanging.py", nproc=SEATS, faults=[dies], max_stall_s=5.0)
    assert done.stop.code == 0, done.log
    assert (tmp_path / "hung").exists()
    (named,) = (e for e in done.of("verdict") if e["fault"].startswith("hang"))
    assert (named["fault"], named["seat"], named["member"]) == ("hang-blocked", 0, 0)
    assert "blocked in between of step" in named["reason"]
