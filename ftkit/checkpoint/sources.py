"""Parts of a snapshot as sources of boxes: from an arena here, or on another node.

A source reads and checks the chunks that a box touches, and no others. One part is a share of
what replicas hold alike, or a rank's shard, or both; the parts of all seats are the whole.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial, reduce

import numpy as np
from numpy.typing import NDArray

from ftkit.checkpoint.arena import Arena
from ftkit.checkpoint.box import Box, TensorBox, boxes_of_range
from ftkit.checkpoint.layout import ITEM_BYTES, Entry
from ftkit.checkpoint.serve import RANGE_BYTES_MAX
from ftkit.checkpoint.slabs import Head
from ftkit.core.ids import Generation, Step

#: Kinds that numpy copies bit for bit, by bytes per element.
_WORDS = {1: "u1", 2: "u2", 4: "u4", 8: "u8", 16: "c16"}


class SnapshotSource:
    """One part of a snapshot. Fits `BoxSource`; not thread-safe."""

    threads = 1

    def __init__(
        self,
        head: Head,
        blocks: Callable[[range], Iterator[memoryview]],
        *,
        name: str,
        memory: Callable[[], memoryview] | None = None,
    ) -> None:
        """Read through `blocks`, or in place where the part is in memory.

        Args:
          head: of the part, checked.
          blocks: chunks of it, counted from its first, each checked (`Arena.blocks`,
            `Remote.blocks`); all that is asked for is taken, unless it raises.
          name: what to call it in reports.
          memory: the part's data in place, unchecked; raises IntegrityError once it may have
            been overwritten.
        """
        self.head = head
        self._blocks = blocks
        self._name = name
        self._memory = memory
        self._checked = np.zeros(len(head.digests), dtype=bool)
        # Small tensors share a chunk, and are read one after another.
        self._last: tuple[int, bytes] = -1, b""
        self._entries = defaultdict[str, list[Entry]](list)
        for entry in head.layout.entries:
            self._entries[entry.name].append(entry)

    @classmethod
    def of_arena(
        cls, arena: Arena, step: Step, generation: Generation | None = None
    ) -> "SnapshotSource":
        """The part of a step in an open arena, of its newest generation unless one is named.

        Raises:
          IntegrityError: it is not there, or its head is damaged.
        """
        sealed = arena.find(step, generation)
        head = arena.head(sealed)
        return cls(
            head,
            partial(arena.blocks, head),
            name=arena.path.name,
            memory=partial(arena.data, sealed),
        )

    def entries(self) -> Iterator[TensorBox]:
        """The boxes of the layout that lie in the part; of an entry that it cuts, several."""
        part = self.head.sealed.part
        for entry in self.head.layout.entries:
            if self._has(entry) or not entry.bytes:
                yield entry.signature
                continue
            item = ITEM_BYTES[entry.dtype]
            start = max(0, -(-(part.first - entry.at) // item))
            stop = min(entry.bytes, part.end - entry.at) // item
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
        inner, size = box.within(entry.box), self.head.sealed.chunk_bytes
        chunks = _touched(entry, inner, size) - self.head.first_chunk
        if self._memory is not None and self._has(entry):
            self._check(chunks)
            at = entry.at - self.head.sealed.part.first
            data = self._memory()[at : at + entry.bytes]
        else:
            data = self._fetched(entry, chunks)
        source = _elements(entry, data, entry.shape)
        np.copyto(_elements(entry, out, box.shape), source[inner.slices])
        if self._memory is not None:
            self._memory()  # what was overwritten while it was copied is not to be used

    def _has(self, entry: Entry) -> bool:
        part = self.head.sealed.part
        return part.first <= entry.at and entry.at + entry.bytes <= part.end

    def _check(self, chunks: NDArray[np.intp]) -> None:
        for run in _runs(chunks[~self._checked[chunks]], len(self._checked)):
            for _ in self._blocks(run):
                pass
            self._checked[run.start : run.stop] = True

    def _fetched(self, entry: Entry, chunks: NDArray[np.intp]) -> memoryview:
        """The bytes of an entry, good where `chunks` are; the others are anything."""
        size, first = self.head.sealed.chunk_bytes, self.head.sealed.part.first
        # Pages that nobody writes cost nothing, so room for all of it is no waste.
        data = np.empty(entry.bytes, dtype=np.uint8).data

        def put(chunk: int, block: memoryview | bytes) -> None:
            at = first + chunk * size - entry.at
            low, high = max(at, 0), min(at + len(block), entry.bytes)
            data[low:high] = block[low - at : high - at]

        if chunks[0] == self._last[0]:
            put(*self._last)
            chunks = chunks[1:]
        # A range at a time: a byte server's answers stay in step with what is asked of it,
        # even when a chunk is damaged.
        for run in _runs(chunks, max(1, RANGE_BYTES_MAX // size)):
            for chunk, block in zip(run, self._blocks(run), strict=True):
                put(chunk, block)
                if chunk == chunks[-1]:
                    self._last = chunk, bytes(block)
        return data

    def __str__(self) -> str:
        return self._name


def _elements(entry: Entry, data: memoryview, shape: tuple[int, ...]) -> NDArray[np.generic]:
    """Bytes as an array of elements, to be copied bit for bit."""
    return np.frombuffer(data, dtype=_WORDS[ITEM_BYTES[entry.dtype]]).reshape(shape)


def _runs(chunks: NDArray[np.intp], longest: int) -> Iterator[range]:
    """Ascending chunks as ranges, none longer than `longest`."""
    found: list[int] = chunks.tolist()
    start = 0
    for end in range(1, len(found) + 1):
        if end == len(found) or found[end] != found[end - 1] + 1 or end - start == longest:
            yield range(found[start], found[end - 1] + 1)
            start = end


def _touched(entry: Entry, box: Box, chunk_bytes: int) -> NDArray[np.intp]:
    """The chunks of the layout that elements `box` of an entry lie in, ascending."""
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
