"""Grid: which shard and chunk shapes let every box be written on its own (pure).

A zarr array has one regular grid, and a file of it (a shard) has one writer. So shards are the
largest that no box boundary cuts, and chunks, the unit of compression and checksums, are
pieces of about 4 MiB that divide a shard: what zarr's sharding codec asks for.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil, gcd, isqrt, log2, prod

from ftkit.checkpoint.persist.boxes import Box, Shape, cuts

CHUNK_BYTES = 4 << 20

#: A regular grid may have this many times more files than boxes before each box becomes an
#: array of its own instead.
_FILES_PER_BOX_MAX = 4


@dataclass(frozen=True, slots=True)
class Grid:
    """One zarr array: the box of its tensor that it holds, and how it is cut."""

    box: Box
    shard: Shape
    """Shape of what one file holds; at the array's end it may reach over the edge."""
    chunk: Shape
    """Shape of what is encoded and checksummed as one; divides `shard`."""

    @property
    def sharded(self) -> bool:
        """Whether a file holds several chunks and an index of them."""
        return self.shard != self.chunk

    @property
    def chunks_per_shard(self) -> Shape:
        return tuple(s // c for s, c in zip(self.shard, self.chunk, strict=True))

    @property
    def files(self) -> int:
        """Files when all of it is written."""
        return _count(self.box.shape, self.shard) if self.box.size else 0


def grids(
    whole: Shape, boxes: Sequence[Box], item_bytes: int, chunk_bytes: int = CHUNK_BYTES
) -> list[Grid]:
    """Cut a tensor for its writers.

    Args:
      whole: the tensor's shape.
      boxes: what the writers hold: together all of it, none twice.
      item_bytes: bytes of an element.
      chunk_bytes: what chunks should be about as large as.

    Returns:
      One grid over all of it; or, where no regular grid fits the boxes with few files, one
      for each box.
    """
    everything = Box.whole(whole)
    held = [b for b in boxes if b.size] or [everything]
    shard = tuple(
        gcd(*found) if found else max(1, size)
        for found, size in zip(cuts(held, everything), whole, strict=True)
    )
    if _count(whole, shard) <= _FILES_PER_BOX_MAX * len(held):
        return [_grid(everything, shard, item_bytes, chunk_bytes)]
    return [_grid(box, box.shape, item_bytes, chunk_bytes) for box in sorted(held)]


def _grid(box: Box, shard: Shape, item_bytes: int, chunk_bytes: int) -> Grid:
    # Where one shard spans a dimension, it may reach over the edge: then a side that is a
    # prime (a vocabulary of 50257) costs a few rows of padding instead of thousands of chunks.
    free = tuple(s >= n for s, n in zip(shard, box.shape, strict=True))

    def cost(chunk: Shape) -> tuple[int, int, int, float]:
        # Half or twice the size is as good; then no padding, then one run of memory.
        off = abs(log2(prod(chunk) * item_bytes / chunk_bytes))
        stored = prod(ceil(s / c) * c for s, c in zip(shard, chunk, strict=True))
        return int(off), stored, _strides(chunk, shard), off

    chunk = min(_chunk_shapes(shard, free, item_bytes, chunk_bytes), key=cost, default=shard)
    shard = tuple(ceil(s / c) * c for s, c in zip(shard, chunk, strict=True))
    return Grid(box, shard, chunk)


def _chunk_shapes(
    shard: Shape, free: tuple[bool, ...], item_bytes: int, chunk_bytes: int
) -> Iterator[Shape]:
    """Chunk shapes worth considering for a shard that is larger than a chunk."""
    if prod(shard) * item_bytes <= chunk_bytes:
        return
    yield shard
    for d, side in enumerate(shard):
        inner = prod(shard[d + 1 :]) * item_bytes
        target = max(1, chunk_bytes // inner)
        sizes = {max((n for n in _divisors(side) if n <= target), default=1)}
        sizes.add(min((n for n in _divisors(side) if n >= target), default=side))
        if free[d]:
            sizes.add(ceil(side / ceil(side / target)))
        for size in sizes:
            yield (1,) * d + (size,) + shard[d + 1 :]  # one run of memory
        if d:
            rest = prod(shard) // side * item_bytes
            size = max((n for n in _divisors(side) if n * rest <= chunk_bytes), default=1)
            yield (*shard[:d], size, *shard[d + 1 :])


def _strides(chunk: Shape, shard: Shape) -> int:
    """0 when a chunk is one run of the shard's memory, 1 when it must be gathered."""
    first = next((d for d, n in enumerate(chunk) if n != 1), len(chunk))
    return int(chunk[first + 1 :] != shard[first + 1 :])


def _divisors(number: int) -> list[int]:
    small = [n for n in range(1, isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def _count(whole: Shape, step: Shape) -> int:
    return prod(-(-n // s) for n, s in zip(whole, step, strict=True))
