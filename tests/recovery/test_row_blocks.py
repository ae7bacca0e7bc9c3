"""Rows are cut into even blocks, each row into one."""

from math import prod

from hypothesis import given
from hypothesis import strategies as st

from ftkit.recovery.row_blocks import block_count, row_blocks

shapes = st.lists(st.lists(st.integers(0, 7), max_size=3), min_size=1, max_size=6)


@given(shapes, st.integers(1, 30))
def test_every_row_is_in_one_block_and_blocks_are_runs(
    shapes: list[list[int]], blocks: int
) -> None:
    cut = row_blocks(shapes, blocks)
    assert len(cut) == blocks
    runs = [rows for block in cut for rows in block]
    assert runs == sorted(runs), "one after another"
    for parameter, shape in enumerate(shapes):
        mine = [row for r in runs if r.parameter == parameter for row in range(r.first, r.end)]
        full = (shape[0] if shape else 1) if prod(shape) else 0
        assert mine == list(range(full))


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 5)), min_size=1), st.integers(1, 12))
def test_blocks_differ_by_a_row_at_most(shapes: list[tuple[int, int]], blocks: int) -> None:
    widest, total = max(row for _, row in shapes), sum(map(prod, shapes))
    for block in row_blocks(shapes, blocks):
        size = sum((r.end - r.first) * shapes[r.parameter][1] for r in block)
        assert abs(size - total / blocks) <= widest


def test_how_many() -> None:
    assert [block_count(seats) for seats in (1, 2, 4, 1000)] == [1, 2, 12, 16_000]
    assert row_blocks([(4, 2)], 2) == (((0, 0, 2),), ((0, 2, 4),))
