"""Store: the few operations a checkpoint needs of a file system or an object store.

All paths are relative to the store's root, with "/", and checked by `confined`. `LocalStore`
and `FsspecStore` are the two kinds; `open_store` chooses by the URL.
"""

import errno
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path, PurePosixPath
from typing import NoReturn, Protocol

from ftkit.core.errors import CapacityError, IntegrityError, StoreError

Buffer = memoryview | bytes

#: No space, quota used up, file larger than allowed.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Batch(AbstractContextManager["Batch"], Protocol):
    """New files that become durable together. Of one thread; left without `flush`, it gives up."""

    def create(self, path: str, buffers: Sequence[Buffer], *, more: bool = False) -> None:
        """Write a new file. The buffers are free to change afterwards.

        It may not be durable before `flush`, which is also where its errors may surface. With
        `more` it goes on: the next calls are of `extend`, the last of them without `more`.

        Raises:
          CapacityError: the store is full.
          StoreError: it failed, or the file exists: nothing is ever overwritten.
        """

    def extend(self, buffers: Sequence[Buffer], *, more: bool = False) -> None:
        """Write more of the file that `create` began; as `create`."""

    def flush(self) -> None:
        """Block until every file created would survive a power cut. Raises as `create`."""


class Store(Protocol):
    """Where checkpoints are kept. Thread-safe. Every method may raise StoreError."""

    @property
    def url(self) -> str:
        """Its root, for messages."""

    @property
    def in_pieces(self) -> bool:
        """Whether the parts of a file are written as they are given, and not when it is whole."""

    def batch(self) -> Batch:
        """Begin to write files."""

    def put(self, path: str, data: bytes, *, exclusive: bool = False) -> None:
        """Write a small file whole or not at all, durable on return.

        Raises:
          FileExistsError: `exclusive`, and it exists.
          CapacityError: the store is full.
        """

    def get(self, path: str) -> bytes:
        """A whole file. FileNotFoundError when there is none."""

    def read(self, path: str, at: int, into: Sequence[memoryview]) -> int:
        """Fill these buffers one after another from byte `at`; returns the bytes there were.

        Raises:
          FileNotFoundError: there is no such file.
        """

    def sizes(self, path: str) -> dict[str, int]:
        """Bytes of every file at any depth below a folder, by path relative to it."""

    def names(self) -> list[str]:
        """What lies directly in the root; empty when there is no root yet."""

    def remove(self, path: str) -> None:
        """Remove a file, durably; one that is not there is no error."""

    def remove_tree(self, path: str) -> None:
        """Remove a folder with all in it. In no order: remove what makes it valid before."""


def confined(path: str) -> str:
    r"""A relative path that stays inside the root, as it was given.

    Raises:
      IntegrityError: it is absolute, empty, or has "..", "\", NUL or empty parts. Paths come
        from ftkit or from a manifest: whichever it was, the bytes are not what ftkit wrote.
    """
    parts = path.split("/")
    if any(p in ("", ".", "..") or "\\" in p or "\0" in p for p in parts):
        raise IntegrityError(f"path {path!r} leads out of its checkpoint, or nowhere; refused")
    assert not PurePosixPath(path).is_absolute(), "an absolute path has an empty first part"
    return path


def failed(error: Exception, doing: str, url: str) -> NoReturn:
    """Raise what a store's error means to its user.

    Raises:
      CapacityError: there is no room.
      StoreError: anything else.
    """
    if isinstance(error, OSError) and error.errno in _FULL:
        raise CapacityError(
            f"{url} is full: {doing}: {error.strerror or error}. Nothing was committed; free room "
            "(`gc` removes what retention does not keep) and save again"
        ) from error
    raise StoreError(f"{doing} in {url} failed: {type(error).__name__}: {error}") from error


def open_store(url: str | Path, **options: object) -> Store:
    """The store at a local path or any URL that fsspec knows.

    Args:
      url: a path, "file://...", "s3://bucket/prefix", "memory://...", ...
      options: for fsspec's file system (credentials, endpoint).

    Raises:
      StoreError: no such kind of store, or its client is not installed.
    """
    from ftkit.checkpoint.persist.fsspec_store import FsspecStore
    from ftkit.checkpoint.persist.local_store import LocalStore

    text = str(url)
    if isinstance(url, Path) or "://" not in text:
        return LocalStore(Path(text))
    if text.startswith("file://"):
        return LocalStore(Path(text.removeprefix("file://")))
    return FsspecStore.open(text, **options)
