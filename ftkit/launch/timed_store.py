"""TimedStore: a store that notes for how long it is waited for, operation by operation.

Two readings of a clock an operation. What is still under way counts with the time it has taken so
far, so that a write that never returns is seen all the same.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from ftkit.checkpoint.persist.store import Batch, Buffer, Store
from ftkit.core.clock import Clock
from ftkit.core.ids import NodeId
from ftkit.detection.signals import IoSeen
from ftkit.launch.passing_store import PassingBatch, PassingStore

WRITE, SYNC, PUT, READ = "write", "sync", "put", "read"


@dataclass(slots=True)
class _Window:
    count: int = 0
    seconds: float = 0.0
    nbytes: int = 0


class TimedStore(PassingStore):
    """Fits `Store`. Thread-safe, as the store beneath."""

    def __init__(self, store: Store, node: NodeId, clock: Clock) -> None:
        """Time what `store` does from here on; `node` is who uses it."""
        super().__init__(store)
        self._node, self._clock = node, clock
        self._lock = threading.Lock()
        # ---- under the lock ----
        self._windows: dict[str, _Window] = {}
        self._running: dict[int, tuple[str, float]] = {}
        """Operations under way: which kind, and from when on they are not counted yet."""
        self._number = 0

    @property
    def beneath(self) -> Store:
        """The store itself: a lease is taken in other ways of one that is a folder."""
        return self._store

    def take(self) -> list[IoSeen]:
        """What was done since the last call. From any thread; waits for no operation."""
        with self._lock:
            now = self._clock.now()
            for number, (op, since) in self._running.items():
                self._windows.setdefault(op, _Window()).seconds += now - since
                self._running[number] = op, now
            windows, self._windows = self._windows, {}
        return [
            IoSeen(
                node=self._node,
                at=now,
                path=self._store.url,
                op=op,
                count=w.count,
                seconds=w.seconds,
                nbytes=w.nbytes,
            )
            for op, w in windows.items()
        ]

    @contextmanager
    def timing(self, op: str, nbytes: int) -> Iterator[None]:
        """Count a block as one operation with so many bytes."""
        with self._lock:
            self._number += 1
            number = self._number
            self._running[number] = op, self._clock.now()
        try:
            yield
        finally:
            with self._lock:
                _, since = self._running.pop(number)
                window = self._windows.setdefault(op, _Window())
                window.count += 1
                window.seconds += self._clock.now() - since
                window.nbytes += nbytes

    def batch(self) -> Batch:
        return _TimedBatch(self._store.batch(), self)

    def put(self, path: str, data: bytes, *, exclusive: bool = False) -> None:
        with self.timing(PUT, len(data)):
            super().put(path, data, exclusive=exclusive)

    def get(self, path: str) -> bytes:
        with self.timing(READ, 0):
            return super().get(path)

    def read(self, path: str, at: int, into: Sequence[memoryview]) -> int:
        with self.timing(READ, sum(m.nbytes for m in into)):
            return super().read(path, at, into)


class _TimedBatch(PassingBatch):
    """See `Batch`."""

    def __init__(self, batch: Batch, store: TimedStore) -> None:
        super().__init__(batch)
        self._store = store
        self._nbytes = 0

    def create(self, path: str, buffers: Sequence[Buffer], *, more: bool = False) -> None:
        with self._writing(buffers):
            super().create(path, buffers, more=more)

    def extend(self, buffers: Sequence[Buffer], *, more: bool = False) -> None:
        with self._writing(buffers):
            super().extend(buffers, more=more)

    @contextmanager
    def _writing(self, buffers: Sequence[Buffer]) -> Iterator[None]:
        nbytes = sum(memoryview(b).nbytes for b in buffers)
        with self._store.timing(WRITE, nbytes):
            yield
        self._nbytes += nbytes

    def flush(self) -> None:
        with self._store.timing(SYNC, self._nbytes):
            super().flush()
        self._nbytes = 0
