"""An arena is made with its pages or not at all, and grows without losing a good snapshot."""

import errno
import os
import subprocess

import pytest

from ftkit.checkpoint.arena import Arena, arena_path
from ftkit.checkpoint.layout import StateLayout
from ftkit.checkpoint.provision import ensure_arena
from ftkit.core.errors import CapacityError
from ftkit.core.ids import JobId, Seat

from .helpers import data_of, make_arena, pattern, write_pattern

LAYOUT = StateLayout.of([("a", "float32", (100, 7)), ("b", "uint8", (3,))], small_bytes=200)


def expected(step: int) -> bytes:
    return pattern(step, LAYOUT.total_bytes)[: LAYOUT.total_bytes]


@pytest.fixture
def path(tmp_path):
    return arena_path(JobId("t"), Seat(0), tmp_path)


def test_growth_carries_good_snapshots_over(path):
    with make_arena(path, LAYOUT) as arena:
        write_pattern(arena, LAYOUT, 1)
        write_pattern(arena, LAYOUT, 2)
        at = arena.geometry.slab_at(1) + arena.geometry.data_at
    with path.open("r+b") as file:
        file.seek(at)
        file.write(b"\xaa\xbb")
    big = StateLayout.of([("a", "float32", (9000,))])
    with make_arena(path, big) as arena:
        assert arena.fits(big)
        assert arena.sealed_steps() == (1,), "2 was damaged"
        assert data_of(arena, 1) == expected(1)
        inode = path.stat().st_ino
    with make_arena(path, LAYOUT):
        assert path.stat().st_ino == inode, "large enough already"
    with ensure_arena(path, StateLayout.of([("a", "uint8", (99999,))]), chunk_bytes=777) as arena:
        assert data_of(arena, 1) == expected(1), "it keeps its own chunks"
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_killed_creation_leaves_nothing_in_the_way(path):
    path.with_name(path.name + ".new").write_bytes(b"half")
    with make_arena(path, LAYOUT) as arena:
        assert arena.newest() is None
    path.write_bytes(b"rubbish" * 1000)
    with make_arena(path, LAYOUT) as arena:
        assert arena.newest() is None


def test_no_room_is_refused_before_anything_is_written(path, monkeypatch):
    real = os.statvfs

    def tiny(where):
        found = list(real(where)[:10])
        found[4] = 1  # f_bavail
        return os.statvfs_result(found)

    monkeypatch.setattr(os, "statvfs", tiny)
    with pytest.raises(CapacityError, match=r"needs|does not fit.* bytes free"):
        make_arena(path, LAYOUT)
    assert list(path.parent.iterdir()) == []


def test_room_that_vanishes_meanwhile_leaves_the_old_arena(path, monkeypatch):
    with make_arena(path, LAYOUT) as arena:
        write_pattern(arena, LAYOUT, 1)

    def full(fd, at, count):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(CapacityError, match="No space"):
        make_arena(path, StateLayout.of([("a", "uint8", (99999,))]))
    with Arena.open(path) as arena:
        assert data_of(arena, 1) == expected(1)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_full_tmpfs_is_refused(tmp_path):
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(tmp_path)],
        capture_output=True,
        check=False,
        timeout=20,
    )
    if mounted.returncode:
        pytest.skip("may not mount a tmpfs here")
    try:
        with pytest.raises(CapacityError, match="bytes free"):
            make_arena(arena_path(JobId("t"), Seat(0), tmp_path), LAYOUT)
        assert list(tmp_path.iterdir()) == []
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True, timeout=20)
