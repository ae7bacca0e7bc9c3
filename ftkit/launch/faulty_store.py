"""FaultyStore: a store that strikes at one byte of what is written, for drills.

The agents find the fault in their environment, as ranks find theirs. It strikes once in a run,
whatever is restarted: the drill's event says that it has.
"""

import errno
import json
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from ftkit.checkpoint.persist.store import Batch, Buffer, Store, failed
from ftkit.core.errors import UsageError
from ftkit.core.trace import Trace
from ftkit.launch.passing_store import PassingBatch, PassingStore

VARIABLE = "FTKIT_DRILL_STORE"

#: What each operation of a slow disk takes longer.
SLOW_S = 0.25


class StoreFaultKind(StrEnum):
    """What happens at the byte."""

    KILL = "torn-write"
    """SIGKILL to the agent: of the byte and all after it nothing is written."""
    FULL = "disk-full"
    """From there on the disk has no room."""
    SLOW = "slow-disk"
    """From there on every write and sync takes `SLOW_S` longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreFault:
    """One fault of one node's store."""

    kind: StoreFaultKind
    node: int
    seat: int
    """A seat on that node: whom it takes along."""
    byte: int
    """Of all that the node writes to files of checkpoints, counted from 0."""

    def to_environ(self) -> dict[str, str]:
        """The variable that tells the agents."""
        return {VARIABLE: json.dumps(asdict(self))}

    @classmethod
    def from_environ(cls, environ: Mapping[str, str], *, node: int) -> "StoreFault | None":
        """The fault planned for `node`. Raises UsageError when it cannot be read."""
        text = environ.get(VARIABLE)
        if not text:
            return None
        try:
            value = json.loads(text)
            fault = cls(**{**value, "kind": StoreFaultKind(value["kind"])})
        except (ValueError, TypeError, KeyError) as error:
            raise UsageError(f"{VARIABLE} holds no fault: {error}") from error
        return fault if fault.node == node else None


class FaultyStore(PassingStore):
    """A store that goes wrong at one byte. Fits `Store`."""

    def __init__(self, store: Store, fault: StoreFault, run_dir: Path) -> None:
        """Count from here on; strike unless the run's events tell that it has struck."""
        super().__init__(store)
        self._fault = fault
        self._events = run_dir / "events" / f"drill-store-{fault.node}.jsonl"
        self._spent = self._events.exists()
        self._left = fault.byte

    def batch(self) -> Batch:
        return _FaultyBatch(self._store.batch(), self)

    def put(self, path: str, data: bytes, *, exclusive: bool = False) -> None:
        if self._full:
            self._refuse(path)
        self.drag()
        super().put(path, data, exclusive=exclusive)

    def write(
        self, path: str, buffers: Sequence[Buffer], act: Callable[[Sequence[Buffer]], None]
    ) -> None:
        """Let `act` write a file, or a part of it, or as much of that as comes before the byte."""
        if self._full:
            self._refuse(path)
        self.drag()
        data = b"".join(buffers)
        if self._spent or len(data) <= self._left:
            self._left -= len(data)
            act(buffers)
            return
        if self._fault.kind is StoreFaultKind.SLOW:
            act(buffers)
        else:
            act([data[: self._left]])
        self._strike(path)

    def drag(self) -> None:
        """Take longer, once the disk is slow."""
        if self._spent and self._fault.kind is StoreFaultKind.SLOW:
            time.sleep(SLOW_S)

    @property
    def _full(self) -> bool:
        return self._spent and self._fault.kind is StoreFaultKind.FULL

    def _strike(self, path: str) -> None:
        fault, self._spent = self._fault, True
        seat = fault.seat if fault.kind is StoreFaultKind.KILL else None
        with Trace(self._events) as trace:
            trace.event("drill", fault=fault.kind.value, phase=f"byte {fault.byte}", seat=seat)
        if fault.kind is StoreFaultKind.KILL:
            os.kill(os.getpid(), signal.SIGKILL)
        if fault.kind is StoreFaultKind.FULL:
            self._refuse(path)

    def _refuse(self, path: str) -> None:
        failed(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), f"writing {path}", self.url)


class _FaultyBatch(PassingBatch):
    """See `Batch`."""

    def __init__(self, batch: Batch, store: FaultyStore) -> None:
        super().__init__(batch)
        self._store = store
        self._path = ""

    def create(self, path: str, buffers: Sequence[Buffer], *, more: bool = False) -> None:
        self._path = path
        act = super().create
        self._store.write(path, buffers, lambda some: act(path, some, more=more))

    def extend(self, buffers: Sequence[Buffer], *, more: bool = False) -> None:
        act = super().extend
        self._store.write(self._path, buffers, lambda some: act(some, more=more))

    def flush(self) -> None:
        self._store.drag()
        super().flush()
