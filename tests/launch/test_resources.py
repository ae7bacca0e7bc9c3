"""What an agent sees of its node, and what its wall clock says."""

import time
from pathlib import Path

import pytest

from ftkit.core.errors import UsageError
from ftkit.core.ids import NodeId
from ftkit.core.wall_clock import VARIABLE, wall_clock
from ftkit.detection.signals import NodeSeen, from_json, to_json
from ftkit.launch.config import JobConfig
from ftkit.launch.resources import Resources, free_bytes, pressure, state_bytes


def test_a_node_is_looked_at_and_crosses_the_wire(tmp_path: Path) -> None:
    store = tmp_path / "not" / "made" / "yet"
    config = JobConfig(job="j", command=("x",), run_dir=str(tmp_path), checkpoint_dir=str(store))
    told: list[NodeSeen] = []
    resources = Resources(config, NodeId(3), state_bytes=lambda: 12345, seen=told.append)
    try:
        seen = resources.look()
    finally:
        resources.close()
    assert seen.node == 3
    assert seen.available_bytes > 0
    assert set(seen.disks) == {str(tmp_path), str(store)}
    free, due = seen.disks[str(store)]
    assert free > 0
    assert due == 12345
    assert from_json(to_json(seen)) == seen


def test_where_nobody_can_say_nothing_is_said(tmp_path: Path) -> None:
    assert pressure(tmp_path) == {}
    (tmp_path / "cpu").write_text("some avg10=12.50 avg60=0.00 avg300=0.00 total=7\n")
    (tmp_path / "io").write_text("nonsense")
    assert pressure(tmp_path) == {"cpu": 0.125}
    assert (free_bytes(str(tmp_path / "a" / "b")) or 0) > 0


def test_the_state_is_as_large_as_its_layouts() -> None:
    copies = [
        {"step": 1, "part": ["a", 0, 5, 10, 2]},
        {"step": 2, "part": ["a", 0, 5, 10, 2]},
        {"step": 2, "part": ["b", 0, 7, 7, 2]},
    ]
    assert state_bytes(copies) == 17
    assert state_bytes([]) == 0


def test_a_drill_puts_one_nodes_wall_clock_off() -> None:
    environ = {VARIABLE: "1:-5"}
    assert wall_clock(environ, node=1)() - time.time() == pytest.approx(-5, abs=1)
    assert wall_clock(environ, node=0)() - time.time() == pytest.approx(0, abs=1)
    assert wall_clock({}, node=1) is time.time
    with pytest.raises(UsageError, match="NODE:SECONDS"):
        wall_clock({VARIABLE: "soon"}, node=0)
