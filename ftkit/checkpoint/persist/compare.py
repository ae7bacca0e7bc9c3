"""Compare: in which tensors two checkpoints differ."""

from dataclasses import dataclass

from ftkit.checkpoint.layout import ITEM_BYTES
from ftkit.checkpoint.persist.boxes import Box
from ftkit.checkpoint.persist.checkpoint import Checkpoint, Tensor
from ftkit.checkpoint.persist.manifest import Row


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """What `diff` found; names in order."""

    only_left: tuple[str, ...]
    only_right: tuple[str, ...]
    reshaped: tuple[tuple[Tensor, Tensor], ...]
    """Of other dtype or shape: left, right."""
    changed: tuple[str, ...]
    """Of other contents."""
    same: tuple[str, ...]
    small: tuple[str, ...]
    """Keys of the small state whose values differ or are on one side only."""


def diff(left: Checkpoint, right: Checkpoint) -> Difference:
    """Compare two checkpoints, of the same or of other worlds.

    Tensors cut alike are compared by their checksums, which are read from the manifests: two
    chunks that differ are called the same once in four billion times. Tensors cut otherwise
    are read, and their bytes compared.

    Raises:
      IntegrityError: a chunk that had to be read is damaged.
    """
    both = sorted(left.tensors.keys() & right.tensors.keys())
    pairs = [(left.tensors[n], right.tensors[n]) for n in both]
    alike = [a for a, b in pairs if a == b]
    same = {t.name for t in alike if _same(left, right, t)}
    nothing = object()
    return Difference(
        only_left=tuple(sorted(left.tensors.keys() - right.tensors.keys())),
        only_right=tuple(sorted(right.tensors.keys() - left.tensors.keys())),
        reshaped=tuple((a, b) for a, b in pairs if a != b),
        changed=tuple(t.name for t in alike if t.name not in same),
        same=tuple(sorted(same)),
        small=tuple(
            key
            for key in sorted(left.small.keys() | right.small.keys())
            if left.small.get(key, nothing) != right.small.get(key, nothing)
        ),
    )


def _same(left: Checkpoint, right: Checkpoint, tensor: Tensor) -> bool:
    mine, theirs = (c.chunks.get(tensor.name, ()) for c in (left, right))
    if {_cut(r) for r in mine} == {_cut(r) for r in theirs}:
        sums = {r.box: r.crc32c for r in theirs}
        return all(sums[r.box] == r.crc32c for r in mine)
    # One chunk of the left at a time: neither tensor need fit into memory.
    return all(_bytes(left, tensor, r.box) == _bytes(right, tensor, r.box) for r in mine)


def _cut(row: Row) -> tuple[Box, tuple[int, ...], str]:
    return row.box, row.chunk, row.codec


def _bytes(checkpoint: Checkpoint, tensor: Tensor, box: Box) -> bytearray:
    data = bytearray(box.size * ITEM_BYTES[tensor.dtype])
    checkpoint.read(tensor.name, box, memoryview(data))
    return data
