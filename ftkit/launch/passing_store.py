"""PassingStore: a store that passes all on to another, for those that change some of it."""

from collections.abc import Sequence
from types import TracebackType
from typing import Self

from ftkit.checkpoint.persist.store import Batch, Buffer, Store


class PassingStore:
    """Fits `Store`. Thread-safe, as the store beneath."""

    def __init__(self, store: Store) -> None:
        """Pass on to `store`."""
        self._store = store

    @property
    def url(self) -> str:
        return self._store.url

    @property
    def in_pieces(self) -> bool:
        return self._store.in_pieces

    def batch(self) -> Batch:
        return self._store.batch()

    def put(self, path: str, data: bytes, *, exclusive: bool = False) -> None:
        self._store.put(path, data, exclusive=exclusive)

    def get(self, path: str) -> bytes:
        return self._store.get(path)

    def read(self, path: str, at: int, into: Sequence[memoryview]) -> int:
        return self._store.read(path, at, into)

    def sizes(self, path: str) -> dict[str, int]:
        return self._store.sizes(path)

    def names(self) -> list[str]:
        return self._store.names()

    def remove(self, path: str) -> None:
        self._store.remove(path)

    def remove_tree(self, path: str) -> None:
        self._store.remove_tree(path)


class PassingBatch:
    """Fits `Batch`, the same way."""

    def __init__(self, batch: Batch) -> None:
        """Pass on to `batch`."""
        self._batch = batch

    def create(self, path: str, buffers: Sequence[Buffer], *, more: bool = False) -> None:
        self._batch.create(path, buffers, more=more)

    def extend(self, buffers: Sequence[Buffer], *, more: bool = False) -> None:
        self._batch.extend(buffers, more=more)

    def flush(self) -> None:
        self._batch.flush()

    def __enter__(self) -> Self:
        self._batch.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._batch.__exit__(kind, error, traceback)
