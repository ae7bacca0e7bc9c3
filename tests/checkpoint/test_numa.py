"""On which memory node an arena lies: the choice, and what the kernel makes of it."""

import logging
import mmap
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ftkit.checkpoint import pages
from ftkit.checkpoint.arena import Arena, arena_path
from ftkit.checkpoint.layout import StateLayout
from ftkit.checkpoint.numa import (
    MemoryNode,
    choose,
    memory_nodes,
    node_of_gpu,
    numbers_of,
    prefer,
    touching_from,
)
from ftkit.checkpoint.provision import ensure_arena
from ftkit.core.errors import UsageError
from ftkit.core.ids import JobId, Seat

#: Two sockets, and memory on CXL behind no processor.
ZERO, ONE, FAR = (
    MemoryNode(0, frozenset(range(8))),
    MemoryNode(1, frozenset(range(8, 16))),
    MemoryNode(4, frozenset()),
)
NODES = [ZERO, ONE, FAR]

LAYOUT = StateLayout.of([("a", "float32", (5000, 7))])


@pytest.mark.parametrize(
    ("setting", "cpus", "gpu_node", "node"),
    [
        ("auto", {9, 10}, None, ONE),
        ("auto", {9, 10}, 0, ZERO),  # the copies come from the GPU
        ("auto", {9, 10}, 7, ONE),  # a node that has no memory
        ("auto", set(range(16)), None, None),
        ("auto", set(), None, None),
        ("off", {9}, 0, None),
        ("1", {0}, 0, ONE),
        ("4", {0}, 0, FAR),
    ],
)
def test_the_node_is_that_of_the_gpu_or_the_processors_or_the_one_named(
    setting: str, cpus: set[int], gpu_node: int | None, node: MemoryNode | None
) -> None:
    place = choose(setting, NODES, cpus=cpus, gpu_node=gpu_node)
    assert place.node == node
    assert place.reason


def test_one_node_is_no_choice_and_memory_without_processors_must_be_named() -> None:
    assert choose("auto", [ZERO], cpus={1}, gpu_node=0).node is None
    assert choose("auto", [ZERO, FAR], cpus=set()).node is None
    assert choose("auto", [], cpus={1}).node is None
    assert choose("0", [ZERO]).node == ZERO


@pytest.mark.parametrize("setting", ["2", "99"])
def test_a_node_that_is_not_there_is_refused_with_those_that_are(setting: str) -> None:
    with pytest.raises(UsageError, match=r"nodes \[0, 1, 4\]"):
        choose(setting, NODES)


@pytest.mark.parametrize("setting", ["", "-1", "on", "1.5"])
def test_a_setting_that_is_none_is_refused(setting: str) -> None:
    with pytest.raises(UsageError, match="not auto, off or the number"):
        choose(setting, NODES)


def test_what_the_kernel_tells_of_nodes_and_devices(tmp_path: Path) -> None:
    assert numbers_of("0-2,5,7-8\n") == [0, 1, 2, 5, 7, 8]
    assert numbers_of("\n") == []
    (tmp_path / "has_memory").write_text("0-1,4\n")
    for node, cpus in ((0, "0-7"), (1, "8-15"), (4, "")):
        (tmp_path / f"node{node}").mkdir()
        (tmp_path / f"node{node}" / "cpulist").write_text(cpus + "\n")
    assert memory_nodes(tmp_path) == NODES
    assert memory_nodes(tmp_path / "none") == []
    for address, told in (("0000:3b:00.0", "1\n"), ("0000:5e:00.0", "-1\n")):
        (tmp_path / address).mkdir()
        (tmp_path / address / "numa_node").write_text(told)
    assert node_of_gpu("0000:3b:00.0", tmp_path) == 1
    assert node_of_gpu("0000:5e:00.0", tmp_path) is None
    assert node_of_gpu("0000:00:00.0", tmp_path) is None


@pytest.fixture
def here() -> MemoryNode:
    """A node of this machine for which its kernel takes a policy."""
    nodes = memory_nodes()
    if not nodes:
        pytest.skip("this kernel tells of no memory nodes")
    with mmap.mmap(-1, mmap.PAGESIZE) as mapped:
        view = np.frombuffer(mapped, dtype=np.uint8)
        refused = prefer(view.ctypes.data, mmap.PAGESIZE, nodes[0].number)
        del view
    if refused:
        pytest.skip(refused)
    return nodes[0]


def policies(path: Path) -> list[str]:
    """What the kernel says of this process's mappings of a file."""
    lines = Path("/proc/self/numa_maps").read_text().splitlines()
    return [line for line in lines if str(path) in line]


@pytest.fixture
def path() -> Iterator[Path]:
    shm = Path("/dev/shm") / f"test-numa-{os.getpid()}"
    shm.mkdir()
    yield arena_path(JobId("t"), Seat(0), shm)
    for file in shm.iterdir():
        file.unlink()
    shm.rmdir()


def test_an_arena_lies_on_its_node_and_so_does_what_it_grows_by(
    path: Path, here: MemoryNode
) -> None:
    with ensure_arena(path, LAYOUT, replicas=4, node=here) as arena:
        (line,) = policies(path)
        assert f"prefer:{here.number} " in line
        arena.reserve(LAYOUT.total_bytes)
        (line,) = policies(path)
        pages_here = next(f for f in line.split() if f.startswith(f"N{here.number}="))
        assert int(pages_here.split("=")[1]) * mmap.PAGESIZE >= 3 * LAYOUT.total_bytes
    # Whoever opens it later obeys too: the policy is the file's.
    with Arena.open(path, writable=True):
        assert f"prefer:{here.number} " in policies(path)[0]


def test_without_a_node_nothing_is_asked_of_the_kernel(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> str:
        raise AssertionError("nobody asked for a node")

    monkeypatch.setattr(pages, "prefer", never)
    ensure_arena(path, LAYOUT).close()


@pytest.mark.parametrize("has_cpus", [True, False])
def test_a_kernel_that_refuses_is_worked_around_and_it_is_said(
    path: Path, has_cpus: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before = os.sched_getaffinity(0)
    one = frozenset({min(before)}) if has_cpus else frozenset[int]()
    seen = list[set[int]]()
    fallocate = pages._fallocate

    def look(*args: object) -> None:
        seen.append(os.sched_getaffinity(0))
        fallocate(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(pages, "_fallocate", look)
    monkeypatch.setattr(pages, "prefer", lambda *_: "the kernel refused mbind(2): not today")
    with caplog.at_level(logging.WARNING):
        ensure_arena(path, LAYOUT, node=MemoryNode(0, one)).close()
    assert seen[0] == (one or before)
    assert os.sched_getaffinity(0) == before
    assert "not today" in caplog.text
    assert "CAP_SYS_NICE" in caplog.text
    assert ("touched from there" if has_cpus else "no processors") in caplog.text


def test_a_node_that_is_not_there_is_refused_by_the_kernel_in_words(here: MemoryNode) -> None:
    with mmap.mmap(-1, mmap.PAGESIZE) as mapped:
        view = np.frombuffer(mapped, dtype=np.uint8)
        assert "mbind(2)" in prefer(view.ctypes.data, mmap.PAGESIZE, 1000)
        del view


def test_on_an_unknown_machine_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "pdp11")
    assert "pdp11" in prefer(0, 0, 0)


def test_a_thread_that_touches_is_back_where_it_was() -> None:
    before = os.sched_getaffinity(0)
    with touching_from(MemoryNode(0, frozenset({min(before)}))) as there:
        assert there
        assert os.sched_getaffinity(0) == {min(before)}
    with touching_from(FAR) as there:
        assert not there
    assert os.sched_getaffinity(0) == before
