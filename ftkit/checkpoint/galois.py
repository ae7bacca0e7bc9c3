"""The code itself: GF(256), the generator of each k+m, and how survivors give the lost (pure).

A stripe has k data shards, numbered 0 to k - 1, and m parity shards, k to k + m - 1. Parity is
a matrix times the data, byte by byte, over GF(256) with the polynomial x^8+x^4+x^3+x^2+1
(0x11d). The matrix is part of the format: what one engine wrote another must decode.

* m = 1: ones, which is XOR.
* m = 2: ones, and the powers of two. The P and Q of RAID-6 (H. P. Anvin, "The mathematics of
  RAID-6", 2004); Q is cheap without lookup tables.
* m >= 3: a Cauchy matrix, 1 / (i xor j) for row i >= k and column j < k (Bloemer et al.,
  ICSI TR-95-048, 1995). Continuing the powers of two would not do: some losses of three could
  not be solved.

Every square part of each matrix has an inverse, so any k shards give all the others.
"""

from collections.abc import Collection, Sequence
from typing import TypeAlias

Matrix: TypeAlias = tuple[tuple[int, ...], ...]
"""Rows of coefficients, each 0 to 255."""

#: Column numbers and powers of two must differ in a field with 255 elements that are not 0.
SHARDS_MAX = 255


def _powers() -> tuple[tuple[int, ...], tuple[int, ...]]:
    exp, log, value = [0] * 510, [0] * 256, 1
    for power in range(255):
        exp[power] = exp[power + 255] = value
        log[value] = power
        value = (value << 1) ^ (0x11D if value & 0x80 else 0)
    return tuple(exp), tuple(log)


_EXP, _LOG = _powers()


def multiply(left: int, right: int) -> int:
    """The product of two field elements. Addition is `^`."""
    return _EXP[_LOG[left] + _LOG[right]] if left and right else 0


def inverse(value: int) -> int:
    """1 / value. ZeroDivisionError for 0."""
    if not value:
        raise ZeroDivisionError("0 has no inverse in GF(256)")
    return _EXP[255 - _LOG[value]]


def generator(k: int, m: int) -> Matrix:
    """The m rows of k coefficients that make parity out of data.

    Raises:
      ValueError: k or m is less than 1, or k + m over 255.
    """
    if k < 1 or m < 1 or k + m > SHARDS_MAX:
        raise ValueError(
            f"a stripe has 1 or more data and parity shards and at most {SHARDS_MAX} in all, "
            f"not {k}+{m}"
        )
    if m <= 2:
        return tuple(tuple(_EXP[row * column % 255] for column in range(k)) for row in range(m))
    return tuple(tuple(inverse(row ^ column) for column in range(k)) for row in range(k, k + m))


def recipe(
    k: int, m: int, have: Collection[int], lost: Sequence[int]
) -> tuple[tuple[int, ...], Matrix]:
    """How to compute the lost shards.

    Args:
      k: data shards in the stripe.
      m: parity shards.
      have: shards that can be read, at least k of them.
      lost: shards to compute, none of them in `have`.

    Returns:
      The k shards to read, data before parity, and one row of k coefficients for each of
      `lost`: the lost shard is the sum of coefficient times shard.
    """
    code = generator(k, m)
    missing = [i for i in range(k) if i not in have]
    known = [i for i in range(k) if i in have]
    # The first parity rows have the cheapest coefficients.
    parity = sorted(i for i in have if i >= k)[: len(missing)]
    assert len(parity) == len(missing), "the caller counted k shards"
    # Each parity row, moved about: sum over missing = parity + sum over known.
    unknown = [[code[p - k][i] for i in missing] for p in parity]
    given = [[code[p - k][i] for i in known] + [int(q == p) for q in parity] for p in parity]
    solved = dict(zip(missing, _solve(unknown, given), strict=True))
    rows = list[tuple[int, ...]]()
    for shard in lost:
        if shard < k:
            rows.append(tuple(solved[shard]))
            continue
        row = [code[shard - k][i] for i in known] + [0] * len(parity)
        for i in missing:
            row = _add_scaled(row, solved[i], code[shard - k][i])
        rows.append(tuple(row))
    return (*known, *parity), tuple(rows)


def _solve(left: list[list[int]], right: list[list[int]]) -> list[list[int]]:
    """X with left * X = right, by Gauss and Jordan. `left` is square and has an inverse."""
    size = len(left)
    for column in range(size):
        pivot = next(r for r in range(column, size) if left[r][column])
        for rows in (left, right):
            rows[column], rows[pivot] = rows[pivot], rows[column]
        factor = inverse(left[column][column])
        for rows in (left, right):
            rows[column] = [multiply(v, factor) for v in rows[column]]
        for row in range(size):
            if row != column and (factor := left[row][column]):
                for rows in (left, right):
                    rows[row] = _add_scaled(rows[row], rows[column], factor)
    return right


def _add_scaled(row: Sequence[int], other: Sequence[int], factor: int) -> list[int]:
    return [a ^ multiply(b, factor) for a, b in zip(row, other, strict=True)]
