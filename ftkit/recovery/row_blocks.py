"""Row blocks: parameters one after another, cut into blocks of about as many elements. Pure.

Cuts fall between rows, the slices of a parameter's first dimension: a block is then a few runs of
rows, each a box of its parameter and one piece of memory. A parameter without dimensions is one row.
"""

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

#: Blocks for each rank, at most: so many others take over when it is lost.
SPREAD_MAX = 16


class Rows(NamedTuple):
    """Rows `first` to `end` of a parameter."""

    parameter: int
    """Its place in the sequence of all."""
    first: int
    end: int


def block_count(seats: int) -> int:
    """Blocks of a job: fixed for its life, so that a block is the same rows in every world."""
    return seats * max(1, min(seats - 1, SPREAD_MAX))


def row_blocks(shapes: Sequence[Sequence[int]], blocks: int) -> tuple[tuple[Rows, ...], ...]:
    """The rows of each block, in order. Together they are every row of every parameter, once.

    A row belongs to the block that its middle lies in, so blocks differ by a row at most.

    Args:
      shapes: of the parameters, in an order that is the same on all ranks.
      blocks: how many.
    """
    found: list[list[Rows]] = [[] for _ in range(blocks)]
    total, at = sum(map(prod, shapes)), 0
    for parameter, shape in enumerate(shapes):
        rows, row = (shape[0], prod(shape[1:])) if shape else (1, 1)
        first = 0
        while row and first < rows:
            block = (2 * (at + first * row) + row) * blocks // (2 * total)
            # The first row whose middle is at the next block's begin, or after it.
            beyond = -(-(2 * total * (block + 1)) // blocks) - 2 * at - row
            end = min(rows, -(-beyond // (2 * row)))
            found[block].append(Rows(parameter, first, end))
            first = end
        at += rows * row
    return tuple(map(tuple, found))
