"""The kernel's counts of its OOM killer, of a control group of either version and of the host."""

from pathlib import Path

import pytest

from ftkit.launch.memory_watch import LATELY_S, MemoryWatch


def host(root: Path, *, kills: int, group: str = "", text: str = "") -> None:
    (root / "proc/self").mkdir(parents=True, exist_ok=True)
    (root / "proc/vmstat").write_text(f"pgfault 7\noom_kill {kills}\n")
    (root / "proc/self/cgroup").write_text(text)
    if group:
        (root / group).parent.mkdir(parents=True, exist_ok=True)
        (root / group).write_text(f"low 0\noom 3\noom_kill {kills}\n")


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("0::/job/a\n", "sys/fs/cgroup/job/a/memory.events"),
        ("0::/../outside\n", "sys/fs/cgroup/memory.events"),
        ("5:cpu:/x\n4:memory:/job\n", "sys/fs/cgroup/memory/job/memory.oom_control"),
    ],
)
def test_a_kill_in_the_group_is_seen(tmp_path: Path, text: str, group: str) -> None:
    host(tmp_path, kills=2, group=group, text=text)
    watch = MemoryWatch(0.0, root=tmp_path)
    assert watch.kills(1.0) == ""
    host(tmp_path, kills=3, group=group, text=text)
    assert "once in its control group" in watch.kills(2.0)


def test_the_host_is_counted_where_there_is_no_group(tmp_path: Path) -> None:
    host(tmp_path, kills=2)
    watch = MemoryWatch(0.0, root=tmp_path)
    host(tmp_path, kills=4)
    assert "2 times in this host" in watch.kills(1.0)


def test_what_is_long_ago_is_forgotten(tmp_path: Path) -> None:
    host(tmp_path, kills=0)
    watch = MemoryWatch(0.0, root=tmp_path)
    host(tmp_path, kills=1)
    for at in range(1, int(3 * LATELY_S)):
        watch.sample(float(at))
    assert watch.kills(3 * LATELY_S) == ""


def test_a_host_that_tells_nothing_is_no_host_with_kills(tmp_path: Path) -> None:
    assert MemoryWatch(0.0, root=tmp_path / "none").kills(1.0) == ""
