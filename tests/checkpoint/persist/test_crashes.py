"""Whatever happens on whichever line: the last good checkpoint stays, and nothing bad is loaded."""

import errno
import os
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from ftkit.checkpoint.persist import local_store
from ftkit.checkpoint.persist.boxes import Box
from ftkit.checkpoint.persist.checkpoint import open_checkpoint
from ftkit.checkpoint.persist.codecs import CodecPolicy
from ftkit.checkpoint.persist.lease import Lease
from ftkit.checkpoint.persist.local_store import LocalStore
from ftkit.checkpoint.persist.plan import CheckpointPlan
from ftkit.checkpoint.persist.store import confined
from ftkit.checkpoint.persist.write import write
from ftkit.core.clock import ManualClock
from ftkit.core.errors import CapacityError, FtkitError, IntegrityError, StoreError
from ftkit.core.ids import JobId, Step
from tests.checkpoint.survival import collect, flip_on_disk, kill_writers

from .stories import (
    CHUNK,
    MIXED,
    Died,
    ModelStore,
    assert_whole_or_none,
    newest,
    pieces_of,
    save,
)

LZ4 = CodecPolicy(small_bytes=0)


def dying_at(point: int, error: Callable[[], BaseException] = Died) -> Callable[[int], None]:
    def strike(change: int) -> None:
        if change >= point:  # from here on nothing works any more
            raise error()

    return strike


def test_a_power_cut_at_any_change_leaves_a_good_checkpoint():
    """Save 1; save 2 and drop 1, dying at each change; then look, go on, and look again."""
    rng = random.Random(0)
    counting = ModelStore()
    save(counting, 1)
    begun = counting.changes
    save(counting, 2, codec=LZ4)
    saved = counting.changes
    collect(counting)
    found = set[int]()
    for point in range(begun + 1, counting.changes + 1):
        for _ in range(2):  # unsynced files end differently each time
            store = ModelStore(dying_at(point))
            save(store, 1)
            with pytest.raises(Died):  # noqa: PT012  # one story
                save(store, 2, codec=LZ4)
                collect(store)
            again = store.after_power_cut(rng)
            assert_whole_or_none(again)
            left = newest(again)
            found.add(left.step)
            if point > saved:
                assert left.step == 2, "it was committed: durable means durable"
            if left.step == 1:
                assert left.skipped == {}, "what was never committed is no damage"
                save(again, 2, codec=LZ4)
            collect(again)
            assert newest(again).step == 2
            assert again.names() == ["step-2"]
    assert found == {1, 2}


@pytest.mark.parametrize("error", [CapacityError, StoreError])
def test_a_store_that_fails_at_any_change_half_commits_nothing(error):
    counting = ModelStore()
    save(counting, 1)
    begun = counting.changes
    save(counting, 2)
    for point in range(begun + 1, counting.changes + 1):
        store = ModelStore(dying_at(point, error))
        save(store, 1)
        with pytest.raises(FtkitError):
            save(store, 2)
        left = newest(store)
        assert left.step == 1 or "step-2/commit.json" in store.files


@pytest.fixture
def in_memory() -> Iterator[Path]:
    """A folder without a disk: what a killed process has written stays, and fsync is quick."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="ftkit-test-") as folder:
        yield Path(folder)


@pytest.mark.multiproc
@pytest.mark.timeout(300)  # 200 processes
def test_sigkill_at_any_system_call_leaves_a_good_checkpoint(in_memory):
    """A real process, real files, half-written ones included."""
    assert set(kill_writers(in_memory, 200, seed=1)) == {1, 2}


def test_everything_is_synced_before_the_commit_record_appears(tmp_path, monkeypatch):
    synced, made = set[str](), set[str]()
    real_open, real_fsync, real_link = os.open, os.fsync, os.link

    def opened(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & os.O_CREAT and "step-" in str(path):
            made.add(str(path))
            made.add(str(Path(path).parent))
        return real_open(path, flags, *args, **kwargs)

    def fsynced(fd: int) -> None:
        synced.add(os.readlink(f"/proc/self/fd/{fd}"))
        real_fsync(fd)

    def linked(part: Any, target: Any) -> None:
        if Path(target).name == "commit.json":
            # The record's own name is synced after; its folder's other names were before.
            assert made <= synced, made - synced
            assert str(tmp_path) in synced, "the step's own name"
            seen.append(True)
        real_link(part, target)

    seen = list[bool]()
    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "fsync", fsynced)
    monkeypatch.setattr(os, "link", linked)
    save(LocalStore(tmp_path), 5)
    assert seen


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("call", ["writev", "fsync", "open", "mkdir", "link"])
def test_a_disk_that_fails_says_so_and_the_next_save_works(tmp_path, monkeypatch, code, call):
    store = LocalStore(tmp_path)
    save(store, 1)
    real = getattr(os, call)

    def failing(*args: Any, **kwargs: Any) -> Any:
        text = " ".join(map(str, args))
        if call in ("writev", "fsync") or "step-2" in text:
            raise OSError(code, os.strerror(code))
        return real(*args, **kwargs)

    with Lease.take(store, JobId("story")), monkeypatch.context() as patch:
        pieces = pieces_of(MIXED, 2)
        plan = CheckpointPlan.of(pieces, chunk_bytes=CHUNK)
        patch.setattr(os, call, failing)
        if call == "link":
            with pytest.raises((CapacityError, StoreError)):
                store.put("step-2/commit.json", b"{}", exclusive=True)
        else:
            wanted = StoreError if code == errno.EIO else CapacityError
            with pytest.raises(wanted, match=r"full|failed"):
                write(store, Step(2), plan, pieces)
    assert newest(store).step == 1
    save(store, 2)
    assert newest(store).step == 2
    assert not list(tmp_path.rglob(".part*"))


def test_a_disk_that_writes_a_little_at_a_time_is_written_to_in_full(tmp_path, monkeypatch):
    real = os.writev
    monkeypatch.setattr(os, "writev", lambda fd, parts: real(fd, [b"".join(parts)[:7]]))
    save(LocalStore(tmp_path), 1)
    monkeypatch.undo()
    assert newest(LocalStore(tmp_path)).step == 1
    monkeypatch.setattr(os, "writev", lambda fd, parts: 0)
    with pytest.raises(StoreError, match="wrote nothing"):
        save(LocalStore(tmp_path), 2)


def test_more_buffers_than_one_call_takes(tmp_path, monkeypatch):
    monkeypatch.setattr(local_store, "_VECTOR", 3)
    save(LocalStore(tmp_path), 1)
    assert newest(LocalStore(tmp_path)).step == 1


def test_a_slow_store_is_given_up():
    clock = ManualClock()
    store = ModelStore(lambda _: clock.advance(1.0))
    pieces = pieces_of(MIXED, 1)
    plan = CheckpointPlan.of(pieces, chunk_bytes=CHUNK)
    with pytest.raises(StoreError, match=r"too slow: \d+ bytes of step 1 took 4\.0 s, and 3 s"):
        write(store, Step(1), plan, pieces, timeout_s=3.0, clock=clock)
    again = ModelStore()
    assert write(again, Step(1), plan, pieces, timeout_s=3.0, clock=clock).rows


def test_one_flipped_bit_anywhere_is_noticed():
    assert flip_on_disk(200, seed=2) == 200


@pytest.mark.parametrize("damage", ["cut", "empty", "gone", "longer", "foreign"])
def test_files_that_are_cut_gone_or_foreign_are_noticed_on_opening(damage):
    clean = ModelStore()
    save(clean, 1)
    save(clean, 2)
    for name in [n for n in clean.files if n.startswith("step-2/")]:
        store = ModelStore()
        store.files = dict(clean.files)
        match damage:
            case "cut":
                store.files[name] = store.files[name][:-1]
            case "empty":
                store.files[name] = b""
            case "gone":
                del store.files[name]
            case "longer":
                store.files[name] += b"\0"
            case "foreign":
                store.files["step-2/tensors/other"] = b"?"
        found = open_checkpoint(store)
        assert found.step == 1
        committed = "step-2/commit.json" in store.files
        assert (2 in found.skipped) == committed
        if committed:
            with pytest.raises(IntegrityError, match=r"step-2|step 2|commit\.json"):
                open_checkpoint(store, Step(2))


class ShortStore(ModelStore):
    """Gives one byte less than asked for, once `short` is set."""

    short = False

    def read(self, path: str, at: int, into: Sequence[memoryview]) -> int:
        return super().read(path, at, into) - self.short


def test_a_short_read_is_no_data():
    store = ShortStore()
    save(store, 1)
    found = open_checkpoint(store)
    store.short = True
    with pytest.raises(IntegrityError, match=r"chunk \[0:8, 0:11\] of 'model/weight'.*c\.0\.0"):
        found.read("model/weight", Box((0, 0), (1, 11)), memoryview(bytearray(44)))


def test_two_files_exchanged_are_noticed():
    """Both are whole and carry good checksums of their own: only the manifest can tell."""
    store = ModelStore()
    save(store, 1)
    save(store, 2)
    name = "step-2/tensors/model.weight/c.0.0"
    store.files[name] = store.files[name.replace("step-2", "step-1")]
    with pytest.raises(IntegrityError, match=confined("tensors/model.weight/c.0.0")):
        open_checkpoint(store).verify()


def test_all_damaged_says_what_is_wrong_with_each():
    store = ModelStore()
    for step in (1, 2):
        save(store, step)
        store.files[f"step-{step}/manifest.parquet"] += b"?"
    with pytest.raises(IntegrityError, match=r"step 2: .*; step 1: .*manifest"):
        open_checkpoint(store)
