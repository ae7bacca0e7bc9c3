"""The planner against a brute-force oracle that paints every element of small arrays."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftkit.checkpoint.box import Box, TensorBox, boxes_of_range
from ftkit.checkpoint.reshard import Holdings, check_names
from ftkit.core.errors import StateChanged

shapes = st.lists(st.integers(0, 6), max_size=3).map(tuple)


@st.composite
def boxes_in(draw, shape):
    ends = [sorted(draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in shape]
    return Box(tuple(a for a, _ in ends), tuple(b - a for a, b in ends))


@st.composite
def two_boxes(draw):
    shape = draw(shapes)
    return shape, draw(boxes_in(shape)), draw(boxes_in(shape))


def painted(shape, boxes):
    count = np.zeros(shape, dtype=int)
    for box in boxes:
        count[box.slices] += 1
    return count


@given(two_boxes())
def test_intersection_and_difference_are_those_of_sets(found):
    shape, left, right = found
    common = left.intersect(right)
    both = painted(shape, [left]) * painted(shape, [right])
    if common is None:
        assert not both.any()
        return
    assert np.array_equal(painted(shape, [common]), both)
    assert np.array_equal(painted(shape, left.without(common)), painted(shape, [left]) - both)
    assert common.within(left).shifted(left.offsets) == common


@given(shapes, st.data())
def test_a_range_of_elements_is_few_boxes(shape, data):
    size = int(np.prod(shape))
    start, stop = sorted(data.draw(st.tuples(st.integers(0, size), st.integers(0, size))))
    boxes = list(boxes_of_range(shape, start, stop))
    count = painted(shape, boxes).reshape(-1)
    assert (count == [start <= i < stop for i in range(size)]).all()
    assert len(boxes) <= 2 * len(shape) + 1


@st.composite
def problems(draw):
    """Tensors, what each source holds of them, what is wanted."""
    tensors = {f"t{i}": draw(shapes) for i in range(draw(st.integers(1, 3)))}

    def some(names):
        return [
            TensorBox(name, "float32", tensors[name], draw(boxes_in(tensors[name])))
            for name in names
        ]

    chosen = st.lists(st.sampled_from(sorted(tensors)), max_size=5)
    sources = [some(draw(chosen)) for _ in range(draw(st.integers(0, 4)))]
    return tensors, sources, some(draw(chosen))


@given(problems(), st.sets(st.integers(0, 3)))
def test_every_wanted_element_is_copied_once_from_the_first_source_that_has_it(problem, without):
    tensors, sources, wants = problem
    plan = Holdings(sources).plan(wants, lambda source: source not in without)
    copies = [np.full(tensors[want.name], -1) for want in wants]
    for read in plan.reads:
        want = wants[read.want]
        assert read.box.intersect(want.box) == read.box
        assert any(
            held.name == want.name and held.box.intersect(read.box) == read.box
            for held in sources[read.source]
        )
        assert (copies[read.want][read.box.slices] == -1).all(), "copied twice"
        copies[read.want][read.box.slices] = read.source
    missing = [np.zeros(tensors[want.name], dtype=bool) for want in wants]
    for place, box in plan.missing:
        assert not missing[place][box.slices].any()
        missing[place][box.slices] = True
    for place, want in enumerate(wants):
        best = np.full(tensors[want.name], len(sources))
        for source in reversed(range(len(sources))):
            if source not in without:
                for held in sources[source]:
                    if held.name == want.name:
                        best[held.box.slices] = source
        wanted = painted(tensors[want.name], [want.box]).astype(bool)
        assert np.array_equal(missing[place], wanted & (best == len(sources)))
        expected = np.where(wanted & (best < len(sources)), best, -1)
        assert np.array_equal(copies[place], expected)


def test_an_earlier_source_is_preferred_and_the_rest_comes_from_the_next():
    whole = TensorBox("w", "float32", (4, 4), Box.whole((4, 4)))
    rows = whole._replace(box=Box((1, 0), (2, 4)))
    plan = Holdings([[rows], [whole]]).plan([whole])
    assert sum(c.box.elements for c in plan.reads if c.source == 0) == 8
    assert sum(c.box.elements for c in plan.reads if c.source == 1) == 8
    assert Holdings([[whole], [rows]]).plan([whole]).reads == ((0, 0, whole.box),)


def sharded(names, ranks, rows):
    return [
        [
            TensorBox(name, "float32", (ranks * rows, 8), Box((rank * rows, 0), (rows, 8)))
            for name in names
        ]
        for rank in range(ranks)
    ]


def test_a_plan_looks_at_neighbours_only(monkeypatch):
    """500 tensors by 64 ranks: not all pairs are compared."""
    looked = 0
    intersect = Box.intersect

    def counted(self, other):
        nonlocal looked
        looked += 1
        return intersect(self, other)

    names = [f"t{i}" for i in range(500)]
    holdings = Holdings(sharded(names, 64, 6))
    monkeypatch.setattr(Box, "intersect", counted)
    wants = sharded(names, 48, 8)[17]
    plan = holdings.plan(wants)
    assert sum(read.box.elements for read in plan.reads) == 500 * 8 * 8
    assert not plan.missing
    assert looked <= 500 * 4


def test_sources_that_disagree_are_named():
    one = TensorBox("w", "float32", (4,), Box((0,), (4,)))
    for other in (one._replace(dtype="int32"), TensorBox("w", "float32", (5,), Box((0,), (4,)))):
        with pytest.raises(StateChanged, match=r"w is float32\[4\] in source 0"):
            Holdings([[one], [other]])


def test_names_are_judged_as_load_state_dict_judges_them():
    held = {"m/a": ("float32", (2,)), "m/b": ("float32", (3,)), "m/d": ("int8", ())}
    wanted = {"m/a": ("float32", (2,)), "m/b": ("float32", (4,)), "m/c": ("float32", (1,))}
    with pytest.raises(StateChanged) as caught:
        check_names(wanted, held)
    for words in (
        "missing: m/c",
        "unexpected: m/d",
        "m/b is float32[3] where it was saved and float32[4] here",
    ):
        assert words in str(caught.value)
    with pytest.raises(StateChanged, match=r"m/b is float32\[3\]") as caught:
        check_names(wanted, held, strict=False)
    assert "missing" not in str(caught.value)
    assert check_names(wanted, held, pattern="*/a") == ["m/a"]
    with pytest.raises(StateChanged, match=r"matches 'x\*'; saved are m/a, m/b, m/d"):
        check_names(wanted, held, pattern="x*")
    del wanted["m/b"]
    assert check_names(wanted, held, strict=False) == ["m/a"]
