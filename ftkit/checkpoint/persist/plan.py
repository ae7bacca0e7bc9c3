"""CheckpointPlan: the arrays of a checkpoint, worked out before anything is written (pure).

Every writer and the committer need the same plan, and get it from the same boxes: those of
all writers, in any order. Its digest stands in every fragment, so that one who planned with
other boxes is noticed.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import xxhash

from ftkit.checkpoint.layout import ITEM_BYTES, StateLayout
from ftkit.checkpoint.persist.boxes import Box, Shape, tiles, uncovered
from ftkit.checkpoint.persist.codecs import Codec, CodecPolicy
from ftkit.checkpoint.persist.grid import CHUNK_BYTES, Grid, grids
from ftkit.checkpoint.persist.zarr_format import array_metadata, array_paths, chunk_key
from ftkit.core.errors import UsageError

#: The zarr group inside a checkpoint.
TENSORS = "tensors"


class Placed(Protocol):
    """A box of a tensor: `layout.Entry` and `Piece` are."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def global_shape(self) -> Shape: ...
    @property
    def offsets(self) -> Shape: ...
    @property
    def shape(self) -> Shape: ...


class Piece(NamedTuple):
    """A box of a tensor, and its bytes."""

    name: str
    dtype: str
    global_shape: Shape
    offsets: Shape
    shape: Shape
    data: memoryview
    """The box's elements in C order, little-endian, contiguous. Read, and not kept."""


def pieces(layout: StateLayout, data: memoryview) -> Iterator[Piece]:
    """The entries of a snapshot, in place.

    Args:
      layout: how the data is laid out.
      data: the snapshot's data, a slab of an arena for one. It must not change until the pieces
        have been written: what does is noticed only by the checksums, when it is read.
    """
    for e in layout.entries:
        view = data[e.at : e.at + e.bytes]
        yield Piece(e.name, e.dtype, e.global_shape, e.offsets, e.shape, view)


@dataclass(frozen=True, slots=True)
class Array:
    """One zarr array: a tensor, or one box of a tensor whose boxes fit no regular grid."""

    name: str
    dtype: str
    whole: Shape
    path: str
    """Its folder inside the checkpoint."""
    grid: Grid
    codec: Codec

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES[self.dtype]

    @property
    def metadata(self) -> bytes:
        """Its zarr.json."""
        return array_metadata(
            self.grid, name=self.name, dtype=self.dtype, whole=self.whole, codec=self.codec
        )

    def files(self, box: Box) -> Iterator[tuple[str, Box]]:
        """The files of a box inside `grid.box`, and the part of the tensor that each holds.

        Raises:
          UsageError: a file would hold more than this box: it was not planned with.
        """
        for index, part in self._cells(box, self.grid.shard):
            if not box.contains(part):
                raise UsageError(
                    f"{self.name!r}: box {box} is not one of those this checkpoint was planned "
                    "with. Give CheckpointPlan.of the boxes of all writers"
                )
            yield f"{self.path}/{chunk_key(index)}", part

    def chunks(self, box: Box) -> Iterator[tuple[Shape, Box]]:
        """The chunks that meet a box: index in the array, and the part of the tensor in each."""
        return self._cells(box, self.grid.chunk)

    def _cells(self, box: Box, step: Shape) -> Iterator[tuple[Shape, Box]]:
        origin = self.grid.box.offsets
        for index, _ in tiles(box.moved(origin, -1), step):
            first = tuple(i * s for i, s in zip(index, step, strict=True))
            cell = Box(first, step).moved(origin) & self.grid.box
            assert cell is not None, "a cell that meets a box inside the array meets the array"
            yield index, cell


@dataclass(frozen=True)
class CheckpointPlan:
    """All arrays, by tensor."""

    arrays: Mapping[str, tuple[Array, ...]]

    @classmethod
    def of(
        cls,
        boxes: Iterable[Placed],
        *,
        codec: CodecPolicy | None = None,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> "CheckpointPlan":
        """Plan a checkpoint.

        Args:
          boxes: what all writers hold together, in any order. A box held by several counts
            once; which of them writes it is the caller's to say.
          codec: how to store it; by default what pays on a local disk.
          chunk_bytes: about what is compressed, checksummed and read as one.

        Raises:
          UsageError: boxes of one tensor disagree on dtype or shape, overlap, or leave a part
            of it to nobody. The message names the tensor.
        """
        policy = codec or CodecPolicy()
        kinds = dict[str, tuple[str, Shape]]()
        held = dict[str, set[Box]]()
        for box in boxes:
            kind = box.dtype, tuple(box.global_shape)
            if box.dtype not in ITEM_BYTES:
                raise UsageError(f"{box.name!r} has dtype {box.dtype!r}, which is not known")
            if kinds.setdefault(box.name, kind) != kind:
                raise UsageError(
                    f"{box.name!r} is {_words(kinds[box.name])} to one writer and {_words(kind)} "
                    "to another"
                )
            held.setdefault(box.name, set()).add(Box(tuple(box.offsets), tuple(box.shape)))
        paths = array_paths(held)
        arrays = dict[str, tuple[Array, ...]]()
        for name, found in sorted(held.items()):
            dtype, whole = kinds[name]
            why = uncovered(Box.whole(whole), found)
            if why is not None:
                raise UsageError(f"{name!r} cannot be checkpointed: {why}")
            cut = grids(whole, sorted(found), ITEM_BYTES[dtype], chunk_bytes)
            total = Box.whole(whole).size * ITEM_BYTES[dtype]
            arrays[name] = tuple(
                Array(
                    name,
                    dtype,
                    whole,
                    f"{TENSORS}/{paths[name]}" + (f"/box-{i}" if len(cut) > 1 else ""),
                    grid,
                    policy.codec(dtype, total),
                )
                for i, grid in enumerate(cut)
            )
        return cls(arrays)

    @cached_property
    def digest(self) -> str:
        """16 hexadecimal digits, equal exactly for equal plans."""
        rows = [
            [a.name, a.dtype, a.whole, a.path, a.grid.box.offsets, a.grid.box.shape, a.grid.shard,
             a.grid.chunk, a.codec]
            for arrays in self.arrays.values() for a in arrays
        ]  # fmt: skip
        return xxhash.xxh3_64_hexdigest(json.dumps(rows).encode())

    def array(self, piece: Placed) -> Array:
        """The array that a piece goes into.

        Raises:
          UsageError: the plan has no such tensor, has it otherwise, or not this box.
        """
        arrays = self.arrays.get(piece.name)
        if arrays is None:
            raise UsageError(f"{piece.name!r} is not in the plan of this checkpoint")
        kind = piece.dtype, tuple(piece.global_shape)
        if kind != (arrays[0].dtype, arrays[0].whole):
            raise UsageError(
                f"{piece.name!r} is {_words(kind)}, but was planned as "
                f"{_words((arrays[0].dtype, arrays[0].whole))}"
            )
        box = Box(tuple(piece.offsets), tuple(piece.shape))
        for array in arrays:
            if array.grid.box.contains(box):
                return array
        raise UsageError(
            f"{piece.name!r}: box {box} is not one of those this checkpoint was planned with. "
            "Give CheckpointPlan.of the boxes of all writers"
        )


def _words(kind: tuple[str, Shape]) -> str:
    return f"{kind[0]}{list(kind[1])}"
