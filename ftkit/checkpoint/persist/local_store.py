"""LocalStore: checkpoints in a folder of this host, durable by fsync.

A file is written and then fsynced by one of a few threads while the next is being written:
concurrent fsyncs share commits of the file system's journal, which made 1200 files durable in
a quarter of the time that one thread took. Folders are fsynced last, the root included.
"""

import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from ftkit.checkpoint.persist.folder import PART
from ftkit.checkpoint.persist.store import Buffer, confined, failed
from ftkit.core.errors import IntegrityError, StoreError

_THREADS = 8

#: Files written and not yet synced; each holds a descriptor.
_PENDING = 64

#: Buffers in one writev; Linux allows 1024.
_VECTOR = 512


class LocalBatch:
    """See `store.Batch`."""

    def __init__(self, store: "LocalStore") -> None:
        self._store = store
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="ftkit-fsync")
        self._syncing = list[Future[None]]()
        self._folders = {store.root}
        self._open: tuple[str, int] | None = None
        """The file that goes on, and its descriptor."""

    def create(self, path: str, buffers: Sequence[Buffer], *, more: bool = False) -> None:
        target = self._store.root / confined(path)
        with self._store.reporting(f"writing {path}"):
            if target.parent not in self._folders:
                self._store.path(path)  # once a folder; O_EXCL follows no link as the last part
                self._enter(target.parent)
            fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            self._open = path, fd
            self._write(buffers, more=more)

    def extend(self, buffers: Sequence[Buffer], *, more: bool = False) -> None:
        assert self._open is not None, "create(more=True) came before"
        with self._store.reporting(f"writing {self._open[0]}"):
            self._write(buffers, more=more)

    def _write(self, buffers: Sequence[Buffer], *, more: bool) -> None:
        assert self._open is not None, "a file is open"
        _, fd = self._open
        try:
            write_all(fd, buffers)
        except BaseException:
            self._abandon()
            raise
        if more:
            return
        self._open = None
        self._syncing.append(self._pool.submit(_sync_and_close, fd))
        while len(self._syncing) > _PENDING:
            self._syncing.pop(0).result()

    def flush(self) -> None:
        with self._store.reporting("making files durable"):
            while self._syncing:
                self._syncing.pop().result()
            # Deepest first, so that no folder is durable before what it names.
            folders = sorted(self._folders, key=lambda f: -len(f.parts))
            list(self._pool.map(sync_folder, folders))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._abandon()
        # Each task closes its descriptor, so they are run to their ends, not cancelled.
        self._pool.shutdown(wait=True)

    def _abandon(self) -> None:
        """Close a file that did not come to its end."""
        if self._open is not None:
            os.close(self._open[1])
            self._open = None

    def _enter(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        while folder != self._store.root:
            self._folders.add(folder)
            folder = folder.parent
        self._folders.add(folder.parent)  # the root may be new there


class LocalStore:
    """See `store.Store`."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()

    @property
    def in_pieces(self) -> bool:
        return True

    @property
    def url(self) -> str:
        return str(self.root)

    def path(self, path: str) -> Path:
        """Where a relative path lies. IntegrityError when it, or a link in it, leads outside."""
        target = self.root / confined(path)
        if not Path(os.path.realpath(target)).is_relative_to(os.path.realpath(self.root)):
            raise IntegrityError(f"{path!r} leads out of {self.root} through a link; refused")
        return target

    @contextmanager
    def reporting(self, doing: str) -> Iterator[None]:
        """Turn errors of the operating system into those of `store.failed`."""
        try:
            yield
        except OSError as error:
            failed(error, doing, self.url)

    def batch(self) -> LocalBatch:
        return LocalBatch(self)

    def put(self, path: str, data: bytes, *, exclusive: bool = False) -> None:
        target = self.path(path)
        # Not beside the target: left there by a writer that died, it would be a file too many.
        part = self.root / f"{PART}{os.getpid()}-{threading.get_ident()}"
        with self.reporting(f"writing {path}"):
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
                try:
                    write_all(fd, [data])
                    os.fsync(fd)
                finally:
                    os.close(fd)
                if not exclusive:
                    part.replace(target)
                elif not _link(part, target):
                    raise FileExistsError(f"{target} exists")
            except FileExistsError as error:
                part.unlink(missing_ok=True)
                exists = error
            except BaseException:
                part.unlink(missing_ok=True)
                raise
            else:
                part.unlink(missing_ok=True)
                sync_folder(target.parent)
                sync_folder(target.parent.parent)
                return
        raise exists

    def get(self, path: str) -> bytes:
        target = self.path(path)
        try:
            return target.read_bytes()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise FileNotFoundError(f"{target} is missing") from error
        except OSError as error:
            failed(error, f"reading {path}", self.url)

    def read(self, path: str, at: int, into: Sequence[memoryview]) -> int:
        target = self.path(path)
        try:
            fd = os.open(target, os.O_RDONLY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise FileNotFoundError(f"{target} is missing") from error
        except OSError as error:
            failed(error, f"opening {path}", self.url)
        try:
            with self.reporting(f"reading {path}"):
                return _read_all(fd, at, into)
        finally:
            os.close(fd)

    def sizes(self, path: str) -> dict[str, int]:
        top = self.path(path)
        found = dict[str, int]()
        with self.reporting(f"listing {path}"):
            for folder, _, files in os.walk(top):
                for name in files:
                    file = Path(folder) / name
                    found[file.relative_to(top).as_posix()] = file.lstat().st_size
        return found

    def names(self) -> list[str]:
        with self.reporting("listing"):
            return sorted(os.listdir(self.root)) if self.root.is_dir() else []

    def remove(self, path: str) -> None:
        target = self.path(path)
        with self.reporting(f"removing {path}"):
            target.unlink(missing_ok=True)
            if target.parent.is_dir():
                sync_folder(target.parent)

    def remove_tree(self, path: str) -> None:
        target = self.path(path)
        with self.reporting(f"removing {path}"):
            if target.is_dir():
                shutil.rmtree(target)
                sync_folder(target.parent)


def write_all(fd: int, buffers: Sequence[Buffer]) -> None:
    """Write buffers one after another, straight from their memory. StoreError when it stops."""
    waiting = [v for v in (memoryview(b).cast("B") for b in buffers) if len(v)]
    waiting.reverse()
    while waiting:
        vector = waiting[: -_VECTOR - 1 : -1]
        written = os.writev(fd, vector)
        if written == 0:
            raise StoreError("the operating system wrote nothing and gave no reason")
        while written:
            view = waiting.pop()
            if written < len(view):
                waiting.append(view[written:])
                break
            written -= len(view)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _sync_and_close(fd: int) -> None:
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _link(part: Path, target: Path) -> bool:
    """Give `part` the name `target` unless it is taken, in one step."""
    try:
        os.link(part, target)
    except FileExistsError:
        return False
    return True


def _read_all(fd: int, at: int, into: Sequence[memoryview]) -> int:
    views = [v for v in into if v.nbytes]
    total = 0
    while views:
        count = os.preadv(fd, views, at + total)
        if count == 0:
            return total
        total += count
        while views and count >= views[0].nbytes:
            count -= views.pop(0).nbytes
        if count:
            views[0] = views[0][count:]
    return total
