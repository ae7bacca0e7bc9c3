"""An arena keeps whole snapshots, whoever writes, reads, pins, flips a bit or dies."""

import os
import random
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftkit.checkpoint.arena import Arena, arena_path
from ftkit.checkpoint.layout import StateLayout
from ftkit.checkpoint.slabs import Geometry, Pin, Sealed, choose_slab
from ftkit.core.errors import AllPinned, CapacityError, IntegrityError, UsageError
from ftkit.core.ids import Generation, JobId, Seat, Step

from .helpers import data_of, make_arena, pattern, write_pattern
from .survival import flip_in_arena

LAYOUT = StateLayout.of(
    [("a", "float32", (100, 7)), ("b", "uint8", (3,)), ("c", "float64", (500,))], small_bytes=200
)


def expected(step: int) -> bytes:
    return pattern(step, LAYOUT.total_bytes)[: LAYOUT.total_bytes]


@pytest.fixture
def path(tmp_path):
    return arena_path(JobId("t"), Seat(0), tmp_path)


def test_round_trip_while_another_maps_it_read_only(path):
    with make_arena(path, LAYOUT) as arena:
        write_pattern(arena, LAYOUT, 1)
        with Arena.open(path) as reader:
            assert data_of(reader, 1) == expected(1)
            arena.start(Step(2), Generation(1), LAYOUT)  # being written
            assert reader.sealed_steps() == (1,)
            write_pattern(arena, LAYOUT, 2)
            assert reader.sealed_steps() == (1, 2)
            assert reader.head(reader.find(Step(2))).small == {"step": 2}
            with pytest.raises(UsageError):
                reader.start(Step(3), Generation(1), LAYOUT)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.stat().st_blocks * 512 >= path.stat().st_size, "its pages must exist"


def test_three_slabs_keep_the_newest_and_the_last_complete(path):
    with make_arena(path, LAYOUT) as arena:
        for step in range(1, 6):
            write_pattern(arena, LAYOUT, step)
        assert arena.sealed_steps() == (3, 4, 5)
        arena.start(Step(6), Generation(1), LAYOUT, complete=Step(3))
        assert arena.sealed_steps() == (3, 5), "3 is complete everywhere, 5 is the newest"


sealed = st.builds(
    lambda g, s: Sealed(generation=Generation(g), step=Step(s)),
    st.integers(0, 3),
    st.integers(0, 4),
)


@given(
    st.lists(st.none() | sealed, min_size=3, max_size=5),
    st.none() | st.integers(0, 4),
    st.sets(st.integers(0, 4)),
)
def test_choose_slab_never_takes_what_may_be_needed(slabs, complete, pinned):
    chosen = choose_slab(slabs, complete, pinned)
    held = [s for s in slabs if s is not None]
    if len(held) < len(slabs):
        assert chosen is not None
        assert slabs[chosen] is None
        return
    newest = max(s.version for s in held)
    if chosen is None:
        free = [s for i, s in enumerate(slabs) if i not in pinned]
        assert len(free) == 0 or [s.version for s in free] == [newest]
        return
    assert chosen not in pinned
    others = [s for i, s in enumerate(slabs) if i != chosen]
    assert newest in [s.version for s in others]
    if not pinned and any(s.step == complete for s in held):
        assert any(s.step == complete for s in others)
    if not pinned and all(s.step != complete for s in held):
        assert slabs[chosen].version == min(s.version for s in held)


def test_a_pinned_snapshot_stays_until_it_is_let_go(path):
    with make_arena(path, LAYOUT, slabs=4) as arena, Arena.open(path, writable=True) as agent:
        write_pattern(arena, LAYOUT, 1, pins=[Pin.PERSIST])
        write_pattern(arena, LAYOUT, 2)
        first, second = agent.snapshots()
        assert agent.pin(second, Pin.PARITY)
        for step in range(3, 9):
            write_pattern(arena, LAYOUT, step)
        assert arena.sealed_steps() == (1, 2, 7, 8)
        assert agent.pin(first, Pin.PARITY)
        assert agent.pin(first, Pin.PERSIST, on=False)
        write_pattern(arena, LAYOUT, 9)
        assert arena.sealed_steps() == (1, 2, 8, 9), "parity still reads 1"
        agent.pin(agent.find(Step(8)), Pin.PERSIST)
        with pytest.raises(AllPinned, match="3 of 4 are being read"):
            arena.start(Step(10), Generation(1), LAYOUT)
        assert agent.pin(first, Pin.PARITY, on=False)
        write_pattern(arena, LAYOUT, 10)
        assert arena.sealed_steps() == (2, 8, 9, 10)
        assert not agent.pin(first, Pin.PARITY), "it is gone"


def test_a_newer_generation_wins_over_a_higher_step(path):
    with make_arena(path, LAYOUT) as arena:
        write_pattern(arena, LAYOUT, 7, generation=1)
        write_pattern(arena, LAYOUT, 6, generation=2)
        newest = arena.newest()
        assert newest is not None
        assert newest.step == 6


def test_a_snapshot_that_does_not_fit_is_refused(path):
    big = StateLayout.of([("a", "float32", (9000,))], small_bytes=200)
    with make_arena(path, LAYOUT) as arena:
        write_pattern(arena, LAYOUT, 1)
        with pytest.raises(CapacityError, match="36032"):
            arena.start(Step(2), Generation(1), big)
        writer = arena.start(Step(2), Generation(1), LAYOUT)
        with pytest.raises(CapacityError, match="201 bytes"):
            writer.seal(b"x" * 201)
        assert arena.sealed_steps() == (1,)


def test_a_flipped_bit_anywhere_is_found_and_never_loaded(path):
    assert flip_in_arena(path, 500, seed=7) == 500


def test_an_overwritten_slab_is_noticed_by_its_reader(path):
    with make_arena(path, LAYOUT) as arena, Arena.open(path) as reader:
        write_pattern(arena, LAYOUT, 1)
        head = reader.head(reader.find(Step(1)))
        blocks = reader.blocks(head)
        next(blocks)
        for step in (2, 3, 4):
            write_pattern(arena, LAYOUT, step)
        with pytest.raises(IntegrityError):
            list(blocks)
        head = reader.head(reader.find(Step(4)))
        blocks = reader.blocks(head)
        for _ in head.digests:
            next(blocks)
        for step in (5, 6, 7):
            write_pattern(arena, LAYOUT, step)
        with pytest.raises(IntegrityError, match="overwritten"):
            next(blocks)


def test_links_truncated_files_and_odd_names_are_refused(path, tmp_path):
    with make_arena(path, LAYOUT):
        pass
    link = tmp_path / "link"
    link.symlink_to(path)
    with pytest.raises(OSError, match="symbolic links"):
        Arena.open(link)
    os.truncate(path, path.stat().st_size - 4096)
    with pytest.raises(IntegrityError, match="first page says"):
        Arena.open(path)
    with pytest.raises(UsageError):
        arena_path(JobId("../x"), Seat(0))
    with pytest.raises(ValueError, match="at least 3"):
        Geometry(data_bytes=1, meta_bytes=1, chunk_bytes=1, slabs=2)
    assert Sealed.from_page(bytes(4096)) is None


WRITER = """
import sys
from pathlib import Path
from ftkit.checkpoint.arena import Arena
from ftkit.checkpoint.layout import StateLayout
from tests.checkpoint.helpers import write_pattern
layout = StateLayout.of([("a", "uint8", (int(sys.argv[2]),))], small_bytes=200)
arena = Arena.open(Path(sys.argv[1]), writable=True)
step = int(sys.argv[3])
print("ready", flush=True)
while True:
    step += 1
    write_pattern(arena, layout, step)
"""


@pytest.mark.multiproc
def test_kill_9_at_any_moment_leaves_whole_snapshots(path, tmp_path):
    size = 300_000
    layout = StateLayout.of([("a", "uint8", (size,))], small_bytes=200)
    make_arena(path, layout, chunk_bytes=64 << 10).close()
    chance = random.Random(11)
    step, half_written = 0, 0
    for _ in range(60):
        if half_written >= 3 and step > 100:
            break
        half_written += _kill_a_writer(path, size, step, chance.uniform(0, 0.05))
        with Arena.open(path) as arena:
            newest = arena.newest_good()
            assert newest is not None
            assert newest == arena.newest(), "what is sealed is whole"
            assert newest.step > step, "progress before the kill survives it"
            step = newest.step
            reference = pattern(step, layout.total_bytes)[: layout.total_bytes]
            assert data_of(arena, step) == reference
            assert arena.head(newest).small == {"step": step}
    assert half_written, "no kill ever hit a slab between writing and sealed"


def _kill_a_writer(path: Path, size: int, step: int, after_s: float) -> bool:
    """Kill a writer `after_s` past its first new snapshot; whether a slab was left torn."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), str(size), str(step)],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        with Arena.open(path) as arena:
            while (newest := arena.newest()) is None or newest.step <= step:
                assert process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(after_s)
    finally:
        process.kill()
        process.wait(20)
        if process.stdout is not None:
            process.stdout.close()
    with Arena.open(path) as arena:
        return None in arena.slabs()
