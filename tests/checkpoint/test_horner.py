"""Schemes are right by the definition of the field, and as short as they were made for."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftkit.checkpoint.galois import Matrix, generator, inverse, multiply, recipe
from ftkit.checkpoint.horner import Scheme, scheme, shifts


def product(found: Scheme, values: list[int]) -> list[int]:
    """What a scheme makes of one byte a shard, by its words."""
    made = list[int]()
    for row in found.rows:
        columns = [*values, *made]

        def total(plane, columns=columns) -> int:
            out = 0
            for column in plane:
                out ^= columns[column]
            return out

        low = high = 0
        for plane in row.down:
            low = multiply(low ^ total(plane), inverse(2))
        for plane in row.up:
            high = multiply(high ^ total(plane), 2)
        value = low ^ high ^ total(row.level)
        made.append(multiply(value, inverse(1 ^ 1 << row.divisor)) if row.divisor else value)
    if found.paired:
        made[0] ^= made[1]
    return [made[found.order.index(target)] for target in range(len(made))]


def expected(matrix: Matrix, values: list[int]) -> list[int]:
    out = []
    for row in matrix:
        out.append(0)
        for c, v in zip(row, values, strict=True):
            out[-1] ^= multiply(c, v)
    return out


matrices = st.integers(1, 5).flatmap(
    lambda k: st.lists(
        st.tuples(*[st.one_of(st.integers(0, 2), st.integers(0, 255))] * k), min_size=1, max_size=3
    )
)


@settings(max_examples=60, deadline=None)
@given(matrices, st.integers(0, 255))
def test_any_matrix(rows, seed):
    values = [(seed * 7 + 31 * i + 1) % 256 for i in range(len(rows[0]))]
    assert product(scheme(tuple(rows)), values) == expected(tuple(rows), values)


def test_parity_takes_one_doubling_for_each_shard_but_one():
    for k in range(2, 9):
        p, q = scheme(generator(k, 2)).rows
        assert (p.up, p.down, p.divisor) == ((), (), 0)
        assert len(q.up) == k - 1
        assert (q.down, q.divisor) == ((), 0)


@pytest.mark.parametrize("k", [2, 3, 5, 8])
def test_two_lost_shards_take_no_more_steps_than_parity_and_one_division(k):
    for lost in itertools.combinations(range(k), 2):
        _, matrix = recipe(k, 2, [i for i in range(k + 2) if i not in lost], lost)
        found = scheme(matrix)
        steps = [len(row.up) + len(row.down) for row in found.rows]
        assert sum(steps) <= k - 1
        assert sorted(row.divisor for row in found.rows) == [0, lost[1] - lost[0]]
        values = [(37 * i + 5) % 256 for i in range(k)]
        assert product(found, values) == expected(matrix, values)


def test_shifts_make_the_whole_series():
    for divisor in range(1, 8):
        series = 1
        for shift in shifts(divisor):
            series ^= series << shift & 0xFF
        assert series == sum(1 << i for i in range(0, 8, divisor))
