"""Parts: which rows belong to whom, and in which order they are made. Pure.

The order is T3's (ASPLOS'24): each rank begins with what the rank after it waits for and ends
with its own, so that the others' parts travel while it still computes.
"""

from collections.abc import Iterator


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


def targets(size: int, rank: int) -> list[int]:
    """The other ranks in the order in which this one serves them."""
    return [(rank + i) % size for i in range(1, size)]


def sources(size: int, rank: int) -> list[int]:
    """The other ranks in the order in which they serve this one."""
    return [(rank - i) % size for i in range(1, size)]
