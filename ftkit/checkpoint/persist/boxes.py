"""Boxes: rectangles of a tensor, cut and compared (pure)."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from types import EllipsisType

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, order=True)
class Box:
    """`shape` elements from `offsets` on, in each dimension; () twice is a scalar."""

    offsets: Shape
    shape: Shape

    def __post_init__(self) -> None:
        if len(self.offsets) != len(self.shape):
            raise ValueError(f"offsets {self.offsets} and shape {self.shape} differ in rank")
        if min((*self.offsets, *self.shape), default=0) < 0:
            raise ValueError(f"box {self.shape} at {self.offsets} has a negative number")

    @classmethod
    def whole(cls, shape: Shape) -> "Box":
        """All of a tensor."""
        return cls((0,) * len(shape), shape)

    @property
    def ends(self) -> Shape:
        return tuple(o + s for o, s in zip(self.offsets, self.shape, strict=True))

    @property
    def size(self) -> int:
        """Elements inside."""
        return prod(self.shape)

    def __and__(self, other: "Box") -> "Box | None":
        """What both cover; None when that is nothing."""
        low = tuple(map(max, self.offsets, other.offsets))
        high = tuple(map(min, self.ends, other.ends))
        if any(a >= b for a, b in zip(low, high, strict=True)):
            return None
        return Box(low, tuple(b - a for a, b in zip(low, high, strict=True)))

    def contains(self, other: "Box") -> bool:
        return all(
            a <= x and y <= b
            for a, x, y, b in zip(self.offsets, other.offsets, other.ends, self.ends, strict=True)
        )

    def moved(self, by: Shape, sign: int = 1) -> "Box":
        """The same box, `sign` times `by` further on."""
        return Box(tuple(o + sign * b for o, b in zip(self.offsets, by, strict=True)), self.shape)

    def within(self, origin: "Box") -> tuple[slice | EllipsisType, ...]:
        """What picks this box out of an array that holds `origin`, as a view of its memory."""
        sides = (
            slice(o - first, o - first + s)
            for o, first, s in zip(self.offsets, origin.offsets, self.shape, strict=True)
        )
        return *sides, ...  # without the dots, numpy would copy a scalar out

    def __str__(self) -> str:
        return "[" + ", ".join(map("{}:{}".format, self.offsets, self.ends)) + "]"


def tiles(box: Box, step: Shape) -> Iterator[tuple[Shape, Box]]:
    """The cells of a regular grid over index 0 that meet `box`, in C order.

    Args:
      box: what to cover.
      step: the cell's shape, every side at least 1.

    Yields:
      Each cell's index and its part inside the box.
    """
    if not box.size:
        return
    ranges = (
        range(o // s, -(-e // s)) for o, e, s in zip(box.offsets, box.ends, step, strict=True)
    )
    for index in product(*ranges):
        cell = Box(tuple(i * s for i, s in zip(index, step, strict=True)), step) & box
        assert cell is not None, "the ranges end where the box does"
        yield index, cell


def uncovered(whole: Box, boxes: Iterable[Box]) -> str | None:
    """Why these boxes do not cover `whole` exactly once; None when they do."""
    found = [b for b in boxes if b.size]
    for box in found:
        if not whole.contains(box):
            return f"{box} is not inside {whole}"
    # A sweep along the dimension with most cuts: a box can only overlap those that have begun
    # and not ended where it begins.
    d = max(range(len(whole.shape)), key=lambda d: len({b.offsets[d] for b in found}), default=None)
    under_way = list[Box]()
    for box in sorted(found, key=lambda b: 0 if d is None else b.offsets[d]):
        if d is not None:
            under_way = [b for b in under_way if b.ends[d] > box.offsets[d]]
        for other in under_way:
            if (box & other) is not None:
                return f"{other} and {box} overlap"
        under_way.append(box)
    covered = sum(b.size for b in found)
    if covered != whole.size:
        return f"{whole.size - covered} of {whole.size} elements of {whole} are in no box"
    return None


def cuts(boxes: Sequence[Box], whole: Box) -> list[set[int]]:
    """In each dimension, where some box begins or ends inside `whole`."""
    return [
        {at for b in boxes for at in (b.offsets[d], b.ends[d])} - {whole.offsets[d], whole.ends[d]}
        for d in range(len(whole.shape))
    ]
