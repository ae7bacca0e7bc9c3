"""How long a store is waited for, also while it does not answer."""

from pathlib import Path

import pytest

from ftkit.checkpoint.persist.local_store import LocalStore
from ftkit.core.clock import ManualClock
from ftkit.core.ids import NodeId
from ftkit.launch.timed_store import TimedStore


class Slow(LocalStore):
    """Half a second for whatever is written or read."""

    def __init__(self, root: Path, clock: ManualClock) -> None:
        super().__init__(root)
        self.clock = clock

    def put(self, path: str, data: bytes, *, exclusive: bool = False) -> None:
        self.clock.advance(0.5)
        super().put(path, data, exclusive=exclusive)

    def get(self, path: str) -> bytes:
        self.clock.advance(0.5)
        return super().get(path)


def told(store: TimedStore) -> dict[str, tuple[int, float, int]]:
    return {s.op: (s.count, s.seconds, s.nbytes) for s in store.take()}


def test_every_operation_is_counted_once_with_its_time(tmp_path: Path) -> None:
    clock = ManualClock()
    store = TimedStore(Slow(tmp_path, clock), NodeId(3), clock)
    store.put("a", b"12345")
    assert store.get("a") == b"12345"
    assert store.get("a") == b"12345"
    (put, read) = store.take()
    assert (put.node, put.path, put.at) == (3, str(tmp_path), 1.5)
    assert (put.op, put.count, put.seconds, put.nbytes) == ("put", 1, 0.5, 5)
    assert (read.op, read.count, read.seconds) == ("read", 2, 1.0)
    assert store.take() == []


def test_a_batch_is_writes_and_one_sync(tmp_path: Path) -> None:
    clock = ManualClock()
    store = TimedStore(LocalStore(tmp_path), NodeId(0), clock)
    with store.batch() as batch:
        batch.create("x", [b"123", memoryview(b"45")])
        batch.create("y", [b"6"])
        batch.flush()
    assert told(store) == {"write": (2, 0.0, 6), "sync": (1, 0.0, 6)}
    assert store.get("x") == b"12345"


def test_what_is_under_way_counts_as_far_as_it_is_and_not_twice(tmp_path: Path) -> None:
    clock = ManualClock()
    store = TimedStore(LocalStore(tmp_path), NodeId(0), clock)
    with store.timing("write", 7):
        clock.advance(1.0)
        assert told(store) == {"write": (0, 1.0, 0)}
        clock.advance(0.25)
    assert told(store) == {"write": (1, 0.25, 7)}


def test_an_error_is_the_stores_and_its_time_is_counted(tmp_path: Path) -> None:
    clock = ManualClock()
    store = TimedStore(Slow(tmp_path, clock), NodeId(0), clock)
    with pytest.raises(FileNotFoundError):
        store.get("none")
    assert told(store) == {"read": (1, 0.5, 0)}
