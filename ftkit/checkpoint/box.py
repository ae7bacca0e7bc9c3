"""Boxes: axis-aligned parts of a tensor, counted in elements (pure).

A box is half-open in each dimension. `()` by `()` is the one element of a scalar.
"""

from collections.abc import Iterable, Iterator
from math import prod
from typing import NamedTuple


class Box(NamedTuple):
    """Where a part of a tensor begins, and how large it is."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> "Box":
        """All of a tensor of this shape."""
        return cls((0,) * len(shape), shape)

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        """What to index the whole tensor by."""
        return tuple(slice(o, o + n) for o, n in zip(self.offsets, self.shape, strict=True))

    def intersect(self, other: "Box") -> "Box | None":
        """The elements that both have, or None when there are none."""
        offsets, shape = list[int](), list[int]()
        for first, size, other_first, other_size in zip(*self, *other, strict=True):
            low = max(first, other_first)
            count = min(first + size, other_first + other_size) - low
            if count <= 0:
                return None
            offsets.append(low)
            shape.append(count)
        return Box(tuple(offsets), tuple(shape))

    def without(self, hole: "Box") -> list["Box"]:
        """What is left when `hole`, which lies in this box, is taken out: disjoint boxes."""
        left = list[Box]()
        offsets, shape = list(self.offsets), list(self.shape)
        for axis, (first, size) in enumerate(zip(*hole, strict=True)):
            start, end = offsets[axis], offsets[axis] + shape[axis]
            for low, high in ((start, first), (first + size, end)):
                if low < high:
                    offsets[axis], shape[axis] = low, high - low
                    left.append(Box(tuple(offsets), tuple(shape)))
            offsets[axis], shape[axis] = first, size
        return left

    def within(self, outer: "Box") -> "Box":
        """The same elements, counted from the first of `outer`."""
        return Box(
            tuple(o - first for o, first in zip(self.offsets, outer.offsets, strict=True)),
            self.shape,
        )

    def shifted(self, by: Iterable[int]) -> "Box":
        """The box further on by so many elements in each dimension; undoes `within`."""
        return Box(tuple(o + n for o, n in zip(self.offsets, by, strict=True)), self.shape)

    def __str__(self) -> str:
        return f"{list(self.shape)} at {list(self.offsets)}"


class TensorBox(NamedTuple):
    """A box of a named tensor: what somebody holds, or wants."""

    name: str
    dtype: str
    """As layouts spell it: "float32"."""
    global_shape: tuple[int, ...]
    box: Box

    def __str__(self) -> str:
        kind = f"{self.dtype}{list(self.box.shape)}"
        if self.box.shape == self.global_shape:
            return kind
        return f"{kind} at {list(self.box.offsets)} of {list(self.global_shape)}"


def boxes_of_range(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """The boxes that make up elements `start` to `stop` of a tensor in C order.

    At most two a dimension and one more: a run of elements cuts rows at its ends only.
    """
    if start >= stop:
        return
    if not shape:
        yield Box((), ())
        return
    row = prod(shape[1:])
    first, last = -(-start // row), stop // row
    if first > last:  # it begins and ends inside one row
        yield from _in_row(shape, last, start - last * row, stop - last * row)
        return
    if start % row:
        yield from _in_row(shape, first - 1, start % row, row)
    if first < last:
        yield Box((first, *(0,) * (len(shape) - 1)), (last - first, *shape[1:]))
    yield from _in_row(shape, last, 0, stop % row)


def _in_row(shape: tuple[int, ...], row: int, start: int, stop: int) -> Iterator[Box]:
    for box in boxes_of_range(shape[1:], start, stop):
        yield Box((row, *box.offsets), (1, *box.shape))
