"""Writing: from boxes in memory to durable zarr files, and the fragment that describes them.

Chunks go from the caller's memory to the store without a copy where they are one run of it
and are stored raw; checksums are computed on the way. Nothing is visible to readers before
`commit`, so a writer may die anywhere.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ftkit.checkpoint.crc import crc32c
from ftkit.checkpoint.persist.boxes import Box, Shape
from ftkit.checkpoint.persist.folder import COMMIT, step_folder
from ftkit.checkpoint.persist.manifest import Fragment, Kind, Row
from ftkit.checkpoint.persist.plan import Array, CheckpointPlan, Piece
from ftkit.checkpoint.persist.profile import SaveProfile
from ftkit.checkpoint.persist.store import Batch, Buffer, Store
from ftkit.checkpoint.persist.zarr_format import CRC_BYTES, METADATA, shard_index, trailer
from ftkit.core.clock import Clock, MonotonicClock
from ftkit.core.errors import StoreError, UsageError
from ftkit.core.ids import Step


def write(
    store: Store,
    step: Step,
    plan: CheckpointPlan,
    pieces: Iterable[Piece],
    *,
    small: Mapping[str, Any] | None = None,
    timeout_s: float | None = None,
    clock: Clock | None = None,
    admit: Callable[[int], None] = lambda nbytes: None,
    piece_bytes: int | None = None,
) -> Fragment:
    """Write one writer's boxes of a checkpoint, and return when they are durable.

    Blocks for as long as the disk takes; call it from a thread or process that training does
    not wait for. Several writers may write to the same step, each its own boxes.

    Args:
      store: where to.
      step: the step; the committer has called `begin` for it.
      plan: the arrays, made from the boxes of all writers.
      pieces: boxes and their bytes; each is written before the next is asked for, and its
        memory is not kept. Boxes without elements are skipped.
      small: JSON-safe state of this writer, under keys that no other writer uses.
      timeout_s: give up when it takes longer. Looked at between files: an operating system
        that hangs in a call is not interrupted.
      clock: for `timeout_s` and the profile.
      admit: called before each file, or piece of one, with its bytes; blocks until they may travel.
      piece_bytes: files are cut into pieces of at most this for it; None for whole files. An object
        is sent whole, so in an object store they are spaced and not cut.

    Returns:
      What `commit` needs.

    Raises:
      UsageError: a piece is not in the plan or its memory has another size, or the step is
        committed already.
      CapacityError: the store is full.
      StoreError: it failed, or was slower than `timeout_s`. After any error what was written
        stays invisible; `begin` and `gc` remove it.
    """
    writing = _Writing(store, step, plan, timeout_s, clock or MonotonicClock(), admit, piece_bytes)
    return writing.run(pieces, dict(small or {}))


class _Writing:
    """One call of `write`."""

    def __init__(
        self,
        store: Store,
        step: Step,
        plan: CheckpointPlan,
        timeout_s: float | None,
        clock: Clock,
        admit: Callable[[int], None],
        piece_bytes: int | None,
    ) -> None:
        self._admit = admit
        self._piece_bytes = piece_bytes if store.in_pieces else None
        self._store = store
        self._step = step
        self._plan = plan
        self._timeout_s = timeout_s
        self._clock = clock
        self._start = clock.now()
        self._rows = list[Row]()
        self._profile = SaveProfile()

    def run(self, pieces: Iterable[Piece], small: dict[str, Any]) -> Fragment:
        folder = step_folder(self._step)
        if COMMIT in self._store.sizes(folder):
            raise UsageError(
                f"step {self._step} is committed in {self._store.url}; a checkpoint is never "
                "overwritten"
            )
        with self._store.batch() as batch:
            for piece in pieces:
                self._piece(batch, folder, piece)
            with self._profile.timing("fsync", self._clock):
                batch.flush()
        self._check_pace()
        return Fragment(
            step=self._step,
            plan_digest=self._plan.digest,
            rows=tuple(self._rows),
            small=small,
            profile=self._profile,
        )

    def _piece(self, batch: Batch, folder: str, piece: Piece) -> None:
        array = self._plan.array(piece)
        box = Box(tuple(piece.offsets), tuple(piece.shape))
        if piece.data.nbytes != box.size * array.item_bytes:
            raise UsageError(
                f"{piece.name!r}: box {box} of {piece.dtype} needs {box.size * array.item_bytes} "
                f"bytes, its memory has {piece.data.nbytes}"
            )
        if not box.size:
            return
        elements = np.frombuffer(piece.data.cast("B"), dtype=f"V{array.item_bytes}")
        elements = elements.reshape(box.shape)
        for file, part in array.files(box):
            with self._profile.timing("codec", self._clock):
                buffers = self._file(array, file, part, elements, box)
            self._paced(batch, f"{folder}/{file}", buffers)
        if box.offsets == array.grid.box.offsets:  # one writer has the array's first box
            data = array.metadata
            self._create(batch, f"{folder}/{array.path}/{METADATA}", [data])
            self._rows.append(metadata_row(array, data))
        self._profile.tensor_bytes += piece.data.nbytes

    def _file(
        self, array: Array, file: str, part: Box, elements: NDArray[np.void], box: Box
    ) -> list[Buffer]:
        buffers = list[Buffer]()
        grid = array.grid
        stored: dict[Shape, tuple[int, int]] = {}
        at = 0
        for index, cell in array.chunks(part):
            run = _padded(elements[cell.within(box)], grid.chunk)
            payload = array.codec.pack(run.reshape(-1).view(np.uint8).data, array.item_bytes)
            mark = trailer(payload)
            buffers += [payload, mark]
            size = payload.nbytes + CRC_BYTES
            stored[index] = at, size
            self._rows.append(_row(array, Kind.CHUNK, cell, file, at, size, mark, chunk=grid.chunk))
            at += size
        if grid.sharded:
            per = grid.chunks_per_shard
            # Chunk indices of the array's, in those of this shard.
            inside = {
                tuple(i % n for i, n in zip(k, per, strict=True)): v for k, v in stored.items()
            }
            index_bytes = shard_index([inside.get(i) for i in np.ndindex(*per)])
            buffers.append(index_bytes)
            mark = index_bytes[-CRC_BYTES:]
            self._rows.append(_row(array, Kind.INDEX, part, file, at, len(index_bytes), mark))
        return buffers

    def _paced(self, batch: Batch, path: str, buffers: list[Buffer]) -> None:
        """Write a file piece by piece, each when it may go."""
        pieces = cut(buffers, self._piece_bytes) if self._piece_bytes else [buffers]
        first, *rest = pieces
        self._admit(_nbytes(first))
        self._create(batch, path, first, more=bool(rest))
        for left, piece in zip(range(len(rest) - 1, -1, -1), rest, strict=True):
            self._admit(_nbytes(piece))
            with self._profile.timing("write", self._clock):
                batch.extend(piece, more=left > 0)
            self._wrote(piece)

    def _create(
        self, batch: Batch, path: str, buffers: list[Buffer], *, more: bool = False
    ) -> None:
        with self._profile.timing("write", self._clock):
            batch.create(path, buffers, more=more)
        self._profile.files += 1
        self._wrote(buffers)

    def _wrote(self, buffers: list[Buffer]) -> None:
        self._profile.stored_bytes += _nbytes(buffers)
        self._check_pace()

    def _check_pace(self) -> None:
        spent = self._clock.now() - self._start
        if self._timeout_s is not None and spent > self._timeout_s:
            raise StoreError(
                f"{self._store.url} is too slow: {self._profile.stored_bytes} bytes of step "
                f"{self._step} took {spent:.1f} s, and {self._timeout_s:g} s were allowed. Nothing "
                "was committed"
            )


def cut(buffers: Iterable[Buffer], piece_bytes: int) -> list[list[Buffer]]:
    """Buffers as runs of at most `piece_bytes`, without a copy; at least one run."""
    pieces, left = [list[Buffer]()], piece_bytes
    for buffer in buffers:
        view = memoryview(buffer).cast("B")
        while view.nbytes:
            if not left:
                pieces.append([])
                left = piece_bytes
            part = view[:left]
            pieces[-1].append(part)
            view, left = view[part.nbytes :], left - part.nbytes
    return pieces


def _nbytes(buffers: Iterable[Buffer]) -> int:
    return sum(memoryview(b).nbytes for b in buffers)


def metadata_row(array: Array, data: bytes) -> Row:
    """The manifest's row of an array's zarr.json, which holds `data`."""
    return Row(
        Kind.METADATA, array.name, array.dtype, array.whole, array.grid.box.offsets,
        array.grid.box.shape, (), f"{array.path}/{METADATA}", 0, len(data),
        crc32c(memoryview(data)), array.codec,
    )  # fmt: skip


def _row(
    array: Array, kind: Kind, box: Box, file: str, at: int, size: int, mark: bytes,
    *, chunk: Shape = (),
) -> Row:  # fmt: skip
    return Row(
        kind, array.name, array.dtype, array.whole, box.offsets, box.shape, chunk, file, at, size,
        int.from_bytes(mark, "little"), array.codec,
    )  # fmt: skip


def _padded(elements: NDArray[np.void], shape: Shape) -> NDArray[np.void]:
    """The chunk as one run of memory: the caller's own where it is one, else a copy.

    zarr stores chunks at an array's edge whole; what lies beyond the edge is zeros.
    """
    if elements.shape == shape:
        return np.ascontiguousarray(elements)
    padded = np.zeros(shape, dtype=elements.dtype)
    padded[tuple(slice(n) for n in elements.shape)] = elements
    return padded
