"""Who writes which box: every box once, by who has its first byte, whatever the parts."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftkit.checkpoint.layout import StateLayout
from ftkit.checkpoint.persist.division import divide, extents, writers
from ftkit.core.errors import IntegrityError
from ftkit.core.ids import Generation, NodeId, Seat, Step
from ftkit.core.inventory import Copy, Part

LAYOUT = StateLayout.of([(f"t{i}", "uint8", (size,)) for i, size in enumerate((70, 0, 500, 64, 3))])


def part(seat: int, first: int, end: int, *, node: int, generation: int = 1) -> Copy:
    return Copy(
        seat=Seat(seat),
        node=NodeId(node),
        path="",
        step=Step(1),
        generation=Generation(generation),
        part=Part(layout=LAYOUT.digest, first=first, end=end, total=LAYOUT.total_bytes),
    )


cuts = st.sets(st.integers(1, LAYOUT.total_bytes - 1), max_size=4).map(
    lambda found: [0, *sorted(found), LAYOUT.total_bytes]
)


@given(cuts, st.lists(st.integers(0, 2), min_size=5, max_size=5))
def test_each_box_is_written_once_where_it_begins_from_all_of_its_bytes(
    bounds: list[int], homes: list[int]
) -> None:
    copies = [
        part(seat, first, end, node=homes[seat])
        for seat, (first, end) in enumerate(pairwise(bounds))
    ]
    found = divide(copies, {LAYOUT.digest: LAYOUT})
    assert found == divide(copies[::-1], {LAYOUT.digest: LAYOUT})
    assert found.keys() <= writers(copies)
    written = [(node, w) for node, todo in found.items() for w in todo]
    assert sorted(w.entry.name for _, w in written) == [e.name for e in LAYOUT.entries]
    for node, writing in written:
        at = writing.entry.at
        for extent in writing.extents:
            assert extent.first == at
            assert extent.copy.part.first <= extent.first < extent.end <= extent.copy.part.end
            at = extent.end
        assert at == writing.entry.at + writing.entry.bytes
        if writing.extents:
            assert node == writing.extents[0].copy.node


def test_the_newest_generation_is_read_where_it_has_the_bytes() -> None:
    total = LAYOUT.total_bytes
    old, new = part(0, 0, total, node=0), part(1, 128, 256, node=1, generation=2)
    (runs,) = extents([old, new]).values()
    assert [(r.copy.seat, r.first, r.end) for r in runs] == [
        (0, 0, 128),
        (1, 128, 256),
        (0, 256, total),
    ]


def test_bytes_that_nobody_has_are_an_error() -> None:
    with pytest.raises(IntegrityError, match=r"byte 100 of .* is in none of 2 parts"):
        extents([part(0, 0, 100, node=0), part(1, 101, LAYOUT.total_bytes, node=1)])


def test_a_box_of_several_layouts_is_written_once() -> None:
    other = StateLayout.of([("t3", "uint8", (64,)), ("own", "uint8", (9,))])
    copies = [
        part(0, 0, LAYOUT.total_bytes, node=0),
        Copy(
            seat=Seat(1), node=NodeId(1), path="", step=Step(1), generation=Generation(1),
            part=Part(layout=other.digest, first=0, end=other.total_bytes, total=other.total_bytes),
        ),
    ]  # fmt: skip
    found = divide(copies, {LAYOUT.digest: LAYOUT, other.digest: other})
    names = sorted(w.entry.name for todo in found.values() for w in todo)
    assert names == ["own", "t0", "t1", "t2", "t3", "t4"]
