"""FsspecStore: checkpoints in whatever fsspec reaches, object stores above all.

An object store makes an object visible and durable with its last PUT, so there is nothing to
sync; what costs is the round trip, so several are under way at once. Files are created by
conditional PUT (If-None-Match), which stores that know it refuse for what exists.

A store that is a file system behind a protocol (sftp, hdfs) is as durable as its server makes a
closed file.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self, TypeVar

from ftkit.checkpoint.persist.store import Buffer, confined, failed
from ftkit.core.errors import FtkitError, StoreError

T = TypeVar("T")

_THREADS = 16

#: Copies of buffers waiting to be sent. One larger file is sent alone.
_PENDING_BYTES = 256 << 20


class FsspecBatch:
    """See `store.Batch`."""

    def __init__(self, store: "FsspecStore") -> None:
        self._store = store
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="ftkit-put")
        self._sending = list[Future[None]]()
        self._room = threading.Condition()
        self._pending = 0
        self._open: tuple[str, list[bytes]] | None = None
        """An object that goes on: it is sent when it is whole, as objects are."""

    def create(self, path: str, buffers: Sequence[Buffer], *, more: bool = False) -> None:
        if more:
            self._open = path, [bytes(b) for b in buffers]
            return
        for future in [f for f in self._sending if f.done()]:
            self._sending.remove(future)
            future.result()
        count = sum(memoryview(b).nbytes for b in buffers)
        with self._room:
            self._room.wait_for(lambda: not self._pending or self._pending + count < _PENDING_BYTES)
            self._pending += count
        self._sending.append(self._pool.submit(self._send, path, b"".join(buffers)))

    def extend(self, buffers: Sequence[Buffer], *, more: bool = False) -> None:
        assert self._open is not None, "create(more=True) came before"
        path, begun = self._open
        begun += [bytes(b) for b in buffers]
        if not more:
            self._open = None
            self.create(path, begun)

    def flush(self) -> None:
        while self._sending:
            self._sending.pop().result()

    def _send(self, path: str, data: bytes) -> None:
        try:
            self._store.put(path, data, exclusive=True)
        except FileExistsError as error:
            failed(error, f"writing {path}", self._store.url)
        finally:
            with self._room:
                self._pending -= len(data)
                self._room.notify()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


class FsspecStore:
    """See `store.Store`."""

    def __init__(self, system: Any, root: str, url: str) -> None:
        """Use an fsspec file system, below `root` as it spells paths."""
        self._system = system
        self._root = root.rstrip("/")
        self._url = url

    @classmethod
    def open(cls, url: str, **options: object) -> Self:
        """Connect. StoreError when fsspec knows no such store or lacks its client."""
        import fsspec  # here, so that local checkpoints do without it

        try:
            # Object stores cache listings for ever; another node's files must be seen.
            options = {"use_listings_cache": False, "skip_instance_cache": True} | options
            system, root = fsspec.core.url_to_fs(url, **options)
        except (ImportError, ValueError, OSError) as error:
            raise StoreError(f"cannot open {url}: {error}") from error
        return cls(system, root, url)

    @property
    def url(self) -> str:
        return self._url

    @property
    def in_pieces(self) -> bool:
        return False

    def batch(self) -> FsspecBatch:
        return FsspecBatch(self)

    def put(self, path: str, data: bytes, *, exclusive: bool = False) -> None:
        target = self._path(path)

        def send() -> None:
            if exclusive and self._system.exists(target):
                # For stores that ignore the condition; those that know it decide themselves.
                raise FileExistsError(f"{path} exists")
            self._system.pipe_file(target, data, mode="create" if exclusive else "overwrite")

        self._do(f"writing {path}", send, FileExistsError)

    def get(self, path: str) -> bytes:
        target = self._path(path)
        data: bytes = self._do(
            f"reading {path}", lambda: self._system.cat_file(target), FileNotFoundError
        )
        return data

    def read(self, path: str, at: int, into: Sequence[memoryview]) -> int:
        target = self._path(path)
        count = sum(v.nbytes for v in into)
        if not count:
            return 0
        data: bytes = self._do(
            f"reading {path}",
            lambda: self._system.cat_file(target, start=at, end=at + count),
            FileNotFoundError,
        )
        rest = memoryview(data)
        for view in into:
            part = rest[: view.nbytes]
            view[: part.nbytes] = part
            rest = rest[part.nbytes :]
        return len(data)

    def sizes(self, path: str) -> dict[str, int]:
        top = self._path(path)
        found = self._do(f"listing {path}", lambda: self._system.find(top, detail=True))
        prefix = self._system._strip_protocol(top).rstrip("/") + "/"
        return {name.removeprefix(prefix): int(info["size"]) for name, info in found.items()}

    def names(self) -> list[str]:
        def listed() -> list[str]:
            try:
                return [str(p) for p in self._system.ls(self._root, detail=False)]
            except FileNotFoundError:
                return []

        return sorted(p.rstrip("/").rsplit("/", 1)[-1] for p in self._do("listing", listed))

    def remove(self, path: str) -> None:
        target = self._path(path)
        try:
            self._do(f"removing {path}", lambda: self._system.rm_file(target), FileNotFoundError)
        except FileNotFoundError:
            pass  # gone is what was asked for

    def remove_tree(self, path: str) -> None:
        target = self._path(path)
        try:
            self._do(
                f"removing {path}",
                lambda: self._system.rm(target, recursive=True),
                FileNotFoundError,
            )
        except FileNotFoundError:
            pass  # gone is what was asked for

    def _path(self, path: str) -> str:
        return f"{self._root}/{confined(path)}"

    def _do(self, doing: str, action: Callable[[], T], *through: type[Exception]) -> T:
        try:
            return action()
        except Exception as error:  # botocore's, for one, are no OSErrors
            if isinstance(error, (FtkitError, *through)):
                raise
            failed(error, doing, self.url)
