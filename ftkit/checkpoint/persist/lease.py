"""Lease: one job writes checkpoints below a root; a second is refused, and told by whom.

The lease is a file of JSON in the root, that of nobody when it was given up. Its holder renews it
while it lives and shows it before each commit; readers need none. One of a process that is dead on
this host, or that has not been renewed for its term, may be taken over, and so may one that another
process of the same job holds: a job's nodes agree among themselves which of them commits.

On a local disk taking over is exclusive (a lock that the kernel drops with its process). An
object store has no such thing: of two jobs that take the same stale lease over in the same
instant, the later keeps it, and the other is refused at its next `check`, before it commits.
"""

import fcntl
import json
import os
import secrets
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import time
from types import TracebackType
from typing import Self, TypeVar

from ftkit.checkpoint.persist.local_store import LocalStore
from ftkit.checkpoint.persist.store import Store
from ftkit.core.errors import RootInUse
from ftkit.core.ids import JobId
from ftkit.core.process_stat import start_ticks

T = TypeVar("T")

LEASE = "lease.json"

#: The file's size, and more than a holder needs, so that it is never too small for the next.
_BYTES = 1024

#: Unix seconds. Hosts must agree on them better than to a term.
WallClock = Callable[[], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """Who holds a lease."""

    job: str
    host: str
    boot: str
    """The host's boot, so that a process of before a reboot is known to be dead."""
    pid: int
    started: int | None
    """When the process started (`core.process_stat`), so that a reused pid is not taken for it."""
    nonce: str
    renewed_at: float
    term_s: float

    @classmethod
    def this_process(cls, job: JobId, *, now: float, term_s: float) -> "Holder":
        return cls(
            job=job,
            host=socket.gethostname(),
            boot=Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            pid=os.getpid(),
            started=start_ticks(os.getpid()),
            nonce=secrets.token_hex(8),
            renewed_at=now,
            term_s=term_s,
        )

    def encode(self) -> bytes:
        return json.dumps(asdict(self)).encode().ljust(_BYTES)

    @classmethod
    def decode(cls, data: bytes) -> "Holder | None":
        """Read `encode`; None for what nobody can have written, which holds nothing."""
        try:
            value = json.loads(data)
            holder = cls(**value)
            float(holder.renewed_at), float(holder.term_s), int(holder.pid)
        except (ValueError, TypeError):
            return None
        return holder

    def __str__(self) -> str:
        return f"job {self.job!r} (process {self.pid} on {self.host})"


def free(holder: Holder, me: Holder, *, alive: Callable[[Holder], bool]) -> bool:
    """Whether `me` may take the place of `holder`; pure.

    Args:
      holder: who holds the lease.
      me: who asks, now.
      alive: whether a process of this host and boot still runs.
    """
    if holder.job == me.job or me.renewed_at - holder.renewed_at > holder.term_s:
        return True
    if holder.host != me.host:
        return False
    return holder.boot != me.boot or not alive(holder)


def one_time(name: JobId) -> JobId:
    """A job's name that nobody else bears, for who holds a lease once and alone."""
    return JobId(f"{name}-{secrets.token_hex(4)}")


class Lease:
    """This process's right to write below a root. Use as a context, or `release` it."""

    def __init__(self, store: Store, holder: Holder, wall: WallClock) -> None:
        """Use `Lease.take`."""
        self._store = store
        self._holder = holder
        self._wall = wall

    @classmethod
    def take(
        cls, store: Store, job: JobId, *, term_s: float = 60.0, wall: WallClock = time
    ) -> Self:
        """Take the lease of a store's root.

        Args:
          store: the root.
          job: this job's name, which no other job may bear.
          term_s: after so many seconds without `check` or `keep`, another may take it.
          wall: Unix seconds.

        Raises:
          RootInUse: another holds it. The message says who, and for how long at most.
          StoreError, CapacityError: the store failed.
        """
        me = Holder.this_process(job, now=wall(), term_s=term_s)
        with _exclusive(store):
            try:
                if isinstance(store, LocalStore) and LEASE in store.names():
                    raise FileExistsError(LEASE)  # `put` would find that out only with room to
                store.put(LEASE, me.encode(), exclusive=True)
            except FileExistsError:
                holder = Holder.decode(store.get(LEASE))
                if holder is not None and not free(holder, me, alive=_alive):
                    left = holder.renewed_at + holder.term_s - me.renewed_at
                    raise RootInUse(
                        f"{store.url} is in use by {holder}. Give this job another root, or end "
                        f"that one; a lease that is not renewed runs out in {left:.0f} s"
                    ) from None
                _replace(store, me.encode())
        return cls(store, me, wall)

    @property
    def checked_at(self) -> float:
        """When it was last shown to be this process's. Unix seconds."""
        return self._holder.renewed_at

    def check(self) -> None:
        """Show that the lease is still this process's, and renew it.

        Raises:
          RootInUse: another has taken it over.
        """
        with _exclusive(self._store):
            try:
                holder = Holder.decode(self._store.get(LEASE))
            except FileNotFoundError:
                holder = None
            if holder is None or holder.nonce != self._holder.nonce:
                raise RootInUse(
                    f"the lease of {self._store.url} was taken over by {holder or 'nobody known'}: "
                    f"job {self._holder.job!r} had not renewed it for {self._holder.term_s:g} s"
                )
            self._holder = replace(self._holder, renewed_at=self._wall())
            _replace(self._store, self._holder.encode())

    def keep(self) -> None:
        """`check`, once a third of the term has passed: to be called often during long work.

        Raises:
          RootInUse: as `check`.
        """
        if self._wall() - self._holder.renewed_at > self._holder.term_s / 3:
            self.check()

    def kept_while(self, items: Iterable[T]) -> Iterator[T]:
        """The same items; the lease is kept between them. Raises as `keep`."""
        for item in items:
            self.keep()
            yield item

    def release(self) -> None:
        """Give the lease up, if it is still this process's."""
        with _exclusive(self._store):
            try:
                holder = Holder.decode(self._store.get(LEASE))
            except FileNotFoundError:
                return
            if holder is not None and holder.nonce == self._holder.nonce:
                if isinstance(self._store, LocalStore):
                    _replace(self._store, b"{}")
                else:
                    self._store.remove(LEASE)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()


@contextmanager
def _exclusive(store: Store) -> Iterator[None]:
    """Keep other processes of this host from changing the lease meanwhile."""
    if not isinstance(store, LocalStore):
        yield
        return
    with store.reporting("locking the lease"):
        store.root.mkdir(parents=True, exist_ok=True)
        fd = os.open(store.root / ".lease.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _replace(store: Store, data: bytes) -> None:
    """Write the lease that is there anew.

    On a local disk in place, so that it can be taken and kept when the disk is full: whoever
    frees room needs it. Torn by a power cut it is nobody's: its holder is gone, too.
    """
    if not isinstance(store, LocalStore):
        store.put(LEASE, data)
        return
    with store.reporting(f"writing {LEASE}"):
        fd = os.open(store.path(LEASE), os.O_WRONLY | os.O_CLOEXEC)
        try:
            whole = data.ljust(_BYTES)
            os.pwrite(fd, whole, 0)
            os.ftruncate(fd, len(whole))
            os.fsync(fd)
        finally:
            os.close(fd)


def _alive(holder: Holder) -> bool:
    return holder.started is not None and start_ticks(holder.pid) == holder.started
