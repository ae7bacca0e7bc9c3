"""Files follow the boxes that ranks write; boxes that fit no regular grid are arrays themselves."""

from itertools import pairwise
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftkit.checkpoint.persist.boxes import Box, tiles, uncovered
from ftkit.checkpoint.persist.grid import CHUNK_BYTES, grids

from .stories import rows


@st.composite
def cut_tensors(draw):
    """A shape, and boxes that cut it along each dimension."""
    shape = tuple(draw(st.lists(st.integers(0, 12), max_size=4)))
    edges = [sorted({0, n, *draw(st.lists(st.integers(0, n), max_size=2))}) for n in shape]
    boxes = [Box((), ())]
    for points in edges:
        sides = list(pairwise(points)) or [(0, 0)]
        boxes = [
            Box((*b.offsets, low), (*b.shape, high - low)) for b in boxes for low, high in sides
        ]
    return shape, boxes


@given(cut_tensors(), st.sampled_from([1, 2, 8]), st.sampled_from([1, 16, 100]))
def test_every_box_has_files_of_its_own_and_all_is_stored_once(cut, item, chunk_bytes):
    shape, boxes = cut
    found = grids(shape, boxes, item, chunk_bytes)
    stored = list[Box]()
    for grid in found:
        assert all(s % c == 0 for s, c in zip(grid.shard, grid.chunk, strict=True))
        assert min(grid.chunk, default=1) >= 1
        for box in boxes:
            if not (grid.box.contains(box) and box.size):
                continue
            for _, part in tiles(box.moved(grid.box.offsets, -1), grid.shard):
                whole = Box(tuple(o // s * s for o, s in zip(part.offsets, grid.shard, strict=True)),
                            grid.shard)  # fmt: skip
                assert (whole & Box.whole(grid.box.shape)) == part, "a file of two writers"
                stored.append(part.moved(grid.box.offsets))
    assert uncovered(Box.whole(shape), stored) is None


@pytest.mark.parametrize(
    ("shape", "boxes", "waste"),
    [
        ((50257, 768), [Box.whole((50257, 768))], 0.001),  # a prime number of rows
        ((50257, 768), rows((50257, 768), 12565, 12565, 12565, 12562), 0.01),
        ((4096, 11008), [Box((0, 5504 * i), (4096, 5504)) for i in range(2)], 0.0),
        ((12569 * 4, 4096), rows((12569 * 4, 4096), *[12569] * 4), 0.0),  # prime for each
        ((1 << 26,), [Box.whole((1 << 26,))], 0.0),
        ((64, 3, 512, 513), [Box.whole((64, 3, 512, 513))], 0.05),
    ],
)
def test_chunks_of_real_tensors_are_about_4_MiB_and_waste_little(shape, boxes, waste):
    (grid,) = grids(shape, boxes, 4)
    assert CHUNK_BYTES / 8 <= prod(grid.chunk) * 4 <= CHUNK_BYTES * 8
    chunks = sum(1 for _ in tiles(Box.whole(shape), grid.chunk))
    assert chunks * prod(grid.chunk) <= (1 + waste) * prod(shape)


def test_boxes_that_fit_no_regular_grid_become_arrays_of_their_own():
    found = grids((1001, 7), rows((1001, 7), 500, 301, 200), 4)
    assert [g.box.shape[0] for g in found] == [500, 301, 200]
    assert sum(g.files for g in found) == 3


brute = st.lists(
    st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 4), st.integers(0, 4)),
    max_size=5,
)


@given(brute)
def test_uncovered_is_what_counting_elements_says(numbers):
    whole = Box.whole((4, 5))
    boxes = [Box((a, b), (c, d)) for a, b, c, d in numbers]
    count = dict[tuple[int, int], int]()
    for box in boxes:
        for i in range(box.offsets[0], box.ends[0]):
            for j in range(box.offsets[1], box.ends[1]):
                count[i, j] = count.get((i, j), 0) + 1
    once = {(i, j): 1 for i in range(4) for j in range(5)}
    assert (uncovered(whole, boxes) is None) == (count == once)


def test_a_scalar_is_covered_by_one_box_only():
    scalar = Box.whole(())
    assert uncovered(scalar, [scalar]) is None
    assert uncovered(scalar, []) is not None
    assert uncovered(scalar, [scalar, scalar]) is not None
