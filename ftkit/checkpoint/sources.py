"""Snapshots as sources of boxes: from an arena, or any memory with a snapshot's head and data.

A source reads and checks the chunks that a box touches, and no others. One arena of a sharded
world is a part of the state; a list of them, one a seat, is the whole of it.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from ftkit.checkpoint.arena import Arena
from ftkit.checkpoint.box import Box, TensorBox, boxes_of_range
from ftkit.checkpoint.layout import ITEM_BYTES, Entry
from ftkit.checkpoint.ports import BoxSource
from ftkit.checkpoint.slots import Head
from ftkit.core.errors import IntegrityError
from ftkit.core.ids import Generation, Seat, Step

#: Kinds that numpy copies bit for bit, by bytes per element.
_WORDS = {1: "u1", 2: "u2", 4: "u4", 8: "u8", 16: "c16"}


class SnapshotSource:
    """One snapshot in memory. Fits `BoxSource`; not thread-safe."""

    def __init__(
        self,
        head: Head,
        data: memoryview,
        *,
        name: str,
        still: Callable[[], object] = lambda: None,
        chunks: range | None = None,
    ) -> None:
        """Read from `data`, which stays the caller's and must outlive this object.

        Args:
          head: of the snapshot, checked.
          data: all of its data, unchecked.
          name: what to call it in reports.
          still: called after each read; raises IntegrityError when the data may have been
            overwritten meanwhile.
          chunks: those that were captured here, in a row; None for all.
        """
        self.head = head
        self._data = data
        self._name = name
        self._still = still
        self._chunks = range(len(head.digests)) if chunks is None else chunks
        self._checked = np.zeros(len(head.digests), dtype=bool)
        self._entries = defaultdict[str, list[Entry]](list)
        for entry in head.layout.entries:
            self._entries[entry.name].append(entry)

    @classmethod
    def of_arena(
        cls, arena: Arena, step: Step, generation: Generation | None = None
    ) -> "SnapshotSource":
        """The snapshot of a step in an open arena, of its newest generation unless one is named.

        Raises:
          IntegrityError: it is not there, or its head is damaged.
        """
        sealed = arena.find(step, generation)
        return cls(
            arena.head(sealed),
            arena.data(sealed),
            name=arena.path.name,
            still=lambda: arena.data(sealed),
        )

    def entries(self) -> Iterator[TensorBox]:
        """The boxes of the layout, or what the captured chunks hold of each."""
        size, end = self.head.sealed.chunk_bytes, self.head.sealed.data_bytes
        low, high = self._chunks.start * size, min(self._chunks.stop * size, end)
        for entry in self.head.layout.entries:
            if (low <= entry.at and entry.at + entry.bytes <= high) or not entry.bytes:
                yield entry.signature
                continue
            item = ITEM_BYTES[entry.dtype]
            start = max(0, -(-(low - entry.at) // item))
            stop = min(entry.bytes, high - entry.at) // item
            for box in boxes_of_range(entry.shape, start, stop):
                yield entry.signature._replace(box=box.shifted(entry.offsets))

    def read(self, name: str, box: Box, out: memoryview, /) -> None:
        """See `BoxSource.read`. ValueError when the box is not inside one of the entries."""
        if not box.elements:
            return
        for entry in self._entries[name]:
            if entry.box.intersect(box) == box:
                break
        else:
            raise ValueError(f"{self} does not hold {box} of {name}")
        inner = box.within(entry.box)
        self._check(_touched(entry, inner, self.head.sealed.chunk_bytes))
        source = _elements(entry, self._data[entry.at : entry.at + entry.bytes], entry.shape)
        np.copyto(_elements(entry, out, box.shape), source[inner.slices])
        self._still()

    def _check(self, chunks: NDArray[np.intp]) -> None:
        size = self.head.sealed.chunk_bytes
        for chunk in map(int, chunks[~self._checked[chunks]]):
            if chunk not in self._chunks:
                raise ValueError(f"chunk {chunk} was not captured in {self}")
            self.head.check(chunk, self._data[chunk * size : (chunk + 1) * size])
            self._checked[chunk] = True

    def __str__(self) -> str:
        return self._name


def snapshot_of_seats(
    arenas: Mapping[Seat, Arena], step: Step, *, seat: Seat
) -> tuple[list[BoxSource], dict[Seat, SnapshotSource]]:
    """The snapshot of a whole world, as sources for one of its, or another's, seats.

    Args:
      arenas: an open arena of each seat that saved; they must outlive the sources.
      step: which step.
      seat: who will load: its own part comes first, then the others in their order.

    Returns:
      The sources, and the same by seat. Seats whose snapshot is lost are not among them.

    Raises:
      IntegrityError: no seat has a snapshot of that step.
    """
    found, lost = dict[Seat, SnapshotSource](), list[str]()
    for other in sorted(arenas, key=lambda s: (s != seat, s)):
        try:
            found[other] = SnapshotSource.of_arena(arenas[other], step)
        except IntegrityError as error:
            lost.append(f"seat {other}: {error}")
    if not found:
        raise IntegrityError(f"no seat has a snapshot of step {step} ({'; '.join(lost)})")
    return list(found.values()), found


def _elements(entry: Entry, data: memoryview, shape: tuple[int, ...]) -> NDArray[np.generic]:
    """Bytes as an array of elements, to be copied bit for bit."""
    return np.frombuffer(data, dtype=_WORDS[ITEM_BYTES[entry.dtype]]).reshape(shape)


def _touched(entry: Entry, box: Box, chunk_bytes: int) -> NDArray[np.intp]:
    """The chunks that elements `box` of an entry lie in, ascending."""
    strides = [ITEM_BYTES[entry.dtype]]
    for size in reversed(entry.shape[1:]):
        strides.insert(0, strides[0] * size)
    # Trailing dimensions in which all or one run of elements is wanted make up one run of bytes.
    run = ITEM_BYTES[entry.dtype]
    axes = len(box.shape)
    while axes and run == strides[axes - 1]:
        axes -= 1
        run *= box.shape[axes]
    at = entry.at + sum(o * s for o, s in zip(box.offsets, strides, strict=False))
    starts = reduce(
        np.add.outer,
        (np.arange(n) * s for n, s in zip(box.shape[:axes], strides[:axes], strict=True)),
        np.array(at),
    ).reshape(-1)
    first, last = starts // chunk_bytes, (starts + run - 1) // chunk_bytes
    edges = np.zeros(int(last[-1]) - int(first[0]) + 2, dtype=np.intp)
    np.add.at(edges, first - first[0], 1)
    np.add.at(edges, last - first[0] + 1, -1)
    touched: NDArray[np.intp] = np.flatnonzero(np.cumsum(edges)) + first[0]
    return touched
