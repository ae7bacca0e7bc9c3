"""Parts: which rows belong to whom, and in which order they are made. Pure.

The order is T3's (ASPLOS'24): each rank begins with what the rank after it waits for and ends
with its own, so that the others' parts travel while it still computes.
"""

import math
from collections.abc import Iterator
from itertools import accumulate


def bounds(rows: int, size: int, rank: int) -> tuple[int, int]:
    """The rows of one rank, as `torch.chunk` and DTensor cut them: the last ranks may have none."""
    each = -(-rows // size)
    return min(rank * each, rows), min((rank + 1) * each, rows)


def pieces(start: int, end: int, count: int) -> Iterator[tuple[int, int]]:
    """`count` runs of rows of about the same length, in order; empty ones are left out."""
    for i in range(count):
        a = start + (end - start) * i // count
        b = start + (end - start) * (i + 1) // count
        if a < b:
            yield a, b


def graded(rows: float, size: int, count: int) -> list[float]:
    """How many rows each of `count` chunks holds, the smallest first, each n/(n-1) times the last.

    What is computed is sent, and the link stands still until the first chunk is there: so that one
    is small. A link as slow as computing needs n/(n-1) times as long for rows as it takes to make
    them, on n ranks, since a rank makes n parts and sends n-1 of them: it is never idle after.
    """
    ratio = size / (size - 1) if size > 1 else 1.0
    weights = [ratio**i for i in range(count)]
    total = math.fsum(weights)
    return [rows * weight / total for weight in weights]


def growing(start: int, end: int, size: int, count: int) -> Iterator[tuple[int, int]]:
    """`pieces` whose lengths are `graded`, the smallest first: for rows that are made, then sent."""
    a = start
    for reached in accumulate(graded(end - start, size, count)):
        b = start + round(reached)
        if a < b:
            yield a, b
            a = b


def shrinking(start: int, end: int, size: int, count: int) -> Iterator[tuple[int, int]]:
    """The smallest last: for rows that come, then are used."""
    for a, b in reversed(list(growing(start, end, size, count))):
        yield start + end - b, start + end - a


def targets(size: int, rank: int) -> list[int]:
    """The other ranks in the order in which this one serves them."""
    return [(rank + i) % size for i in range(1, size)]


def sources(size: int, rank: int) -> list[int]:
    """The other ranks in the order in which they serve this one."""
    return [(rank - i) % size for i in range(1, size)]
