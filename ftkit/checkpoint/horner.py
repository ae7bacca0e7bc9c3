"""Which doublings and additions make a GF(256) matrix times shards, the fewest that are found (pure).

A coefficient is a sum of powers of two, so a row of a product is, by Horner's rule over the
powers: double, add the shards whose coefficient has this power, and so on downwards. That is at
most seven doublings a row, however many shards there are, and none for XOR. Three things make
it fewer for shards that were lost under P and Q:

* Powers below the zeroth are halvings, from the other end. Of Q without d_0 and d_1, a quarter
  is as cheap as the whole.
* What is to be multiplied by 1 / (1 + 2^d) can be divided at the end, at the price of two to
  seven doublings (`planes` does it by shifts). The inverse itself would take seven, and an
  addition for every shard and power.
* A row may add another that was computed before. Two lost data shards differ by P and the
  data that is left.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, reduce
from operator import or_

from ftkit.checkpoint.galois import Matrix, multiply

#: Passes over memory, weighed by what each was measured to take; an addition takes one.
_DOUBLING, _HALVING, _SHIFT, _BIT = 3.4, 3.8, 2.5, 3.3


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a product. A column from k on is the row of that number that was made before."""

    up: tuple[tuple[int, ...], ...]
    """Columns to add before each doubling, in order."""
    down: tuple[tuple[int, ...], ...]
    """Columns to add before each halving, in order."""
    level: tuple[int, ...]
    """Columns to add once both are done."""
    divisor: int
    """Last, divide by 1 + 2^divisor; 0: do not."""

    @property
    def cost(self) -> float:
        """Passes over the memory of a shard."""
        terms = sum(map(len, (*self.up, *self.down, self.level)))
        # Two of the terms that come first are added in one pass.
        first = next((plane for plane in (*self.down, *self.up, self.level) if plane), ())
        found = terms - (len(first) > 1) + _DOUBLING * len(self.up) + _HALVING * len(self.down)
        if self.up and self.down:
            found += 2
        if self.divisor:
            found += _SHIFT * len(shifts(self.divisor)) + _BIT * self.divisor
        return found


@dataclass(frozen=True, slots=True)
class Scheme:
    """A whole product."""

    order: tuple[int, ...]
    """Which target each row goes to."""
    rows: tuple[Row, ...]
    paired: bool
    """The first row is the sum of two targets; the second is to be added to it at last."""

    @property
    def cost(self) -> float:
        return sum(row.cost for row in self.rows) + self.paired


def shifts(divisor: int) -> tuple[int, ...]:
    """The shifts that make 1 + x^d + x^2d + ... out of (1 + x^s) with s = d, 2d, 4d."""
    return tuple(divisor << i for i in range(3) if divisor << i < 8)


@lru_cache(maxsize=512)
def scheme(matrix: Matrix) -> Scheme:
    """The cheapest way that is found to multiply by a matrix; some milliseconds the first time."""
    rows = [bytes(row) for row in matrix]
    forward = tuple(range(len(rows)))
    found = [Scheme(forward, _rows(rows), paired=False)]
    if len(rows) == 2:
        found.append(Scheme(forward[::-1], _rows(rows[::-1]), paired=False))
        found.append(Scheme(forward, _rows([_plus(*rows), rows[1]]), paired=True))
    return min(found, key=lambda s: s.cost)


def _rows(rows: Sequence[bytes]) -> tuple[Row, ...]:
    return tuple(
        min(_candidates(row, rows[:number]), key=lambda r: r.cost)
        for number, row in enumerate(rows)
    )


def _candidates(row: bytes, before: Sequence[bytes]) -> Iterator[Row]:
    """For each divisor the cheapest way, with and without each row that was made before."""
    for divisor in range(8):
        scaled = _times(row, 1 ^ 1 << divisor) if divisor else row
        # Which power of two is to be level: those below are halved up to it.
        ways = [(_times(scaled, 1 << level), level) for level in range(8)]
        for number, other in enumerate(before):
            ways += [
                (_plus(way, _times(other, 1 << power)) + bytes(number) + bytes([1 << power]), level)
                for way, level in ways[:8]
                for power in range(8)
            ]
        # All of them cost the division; the rest is what its bits and its ends cost.
        yield _row(*min(ways, key=lambda way: _steps_cost(*way)), divisor)


def _steps_cost(row: bytes, level: int) -> float:
    every = reduce(or_, row)
    lowest = (every & -every).bit_length() - 1
    return (
        int.from_bytes(row, "big").bit_count()
        + _DOUBLING * max(0, every.bit_length() - 1 - level)
        + _HALVING * max(0, level - lowest)
    )


def _row(coefficients: bytes, level: int, divisor: int) -> Row:
    planes = [
        tuple(column for column, c in enumerate(coefficients) if c >> bit & 1) for bit in range(8)
    ]
    up, down = planes[:level:-1], planes[:level]
    while up and not up[0]:
        up = up[1:]
    while down and not down[0]:
        down = down[1:]
    return Row(tuple(up), tuple(down), planes[level], divisor)


def _plus(left: bytes, right: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(left, right, strict=True))


def _times(row: bytes, value: int) -> bytes:
    return row.translate(_table(value))


@cache
def _table(value: int) -> bytes:
    return bytes(multiply(value, c) for c in range(256))
