"""Where each tensor lies in the data of a snapshot, and which layouts are one."""

import json
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftkit.checkpoint.chunks import PADDING, Share, chunk_count, scatter, units
from ftkit.checkpoint.layout import ALIGN, ITEM_BYTES, Entry, StateLayout
from ftkit.core.errors import IntegrityError, ProtocolError

shapes = st.lists(st.integers(0, 9), max_size=3).map(tuple)
tensors = st.lists(st.tuples(st.sampled_from(sorted(ITEM_BYTES)), shapes), max_size=12)


def layout_of(found: list[tuple[str, tuple[int, ...]]]) -> StateLayout:
    return StateLayout.of([(f"t{i}", d, s) for i, (d, s) in enumerate(found)])


@given(tensors)
def test_round_trip_and_digest(found):
    layout = layout_of(found)
    again = StateLayout.decode(layout.encoded)
    assert again == layout
    assert again.digest == layout.digest
    assert all(e.at % ALIGN == 0 for e in layout.entries)
    assert layout.total_bytes % ALIGN == 0


def test_digest_tells_layouts_apart():
    base = StateLayout.of([("a", "float32", (2, 3))])
    for other in (
        StateLayout.of([("b", "float32", (2, 3))]),
        StateLayout.of([("a", "int32", (2, 3))]),
        StateLayout.of([("a", "float32", (3, 2))]),
        StateLayout.of([("a", "float32", (2, 3))], small_bytes=100),
    ):
        assert other.digest != base.digest


GOOD = StateLayout.of([("a", "float32", (2,)), ("b", "int64", ())]).to_json()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("version",), 1),
        (("entries",), "no"),
        (("entries", 0), ["a"]),
        (("entries", 0, 0), 7),
        (("entries", 0, 1), "float31"),
        (("entries", 0, 2), [-2]),
        (("entries", 0, 2), [3]),  # a box outside its tensor
        (("entries", 0, 2), "2"),
        (("entries", 0, 3), [2, 2]),
        (("entries", 0, 5), True),
        (("entries", 1, 5), 32),  # not aligned
        (("entries", 1, 5), 0),  # over its neighbour
        (("entries", 1, 0), "a"),  # twice
        (("small_bytes",), -1),
    ],
)
def test_nonsense_is_refused(path, value):
    data = deepcopy(GOOD)
    at: Any = data
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    with pytest.raises(ProtocolError):
        StateLayout.from_json(data)


def test_a_changed_field_that_still_makes_sense_fails_the_digest():
    data = json.loads(json.dumps(GOOD))
    data["entries"][0][0] = "c"
    with pytest.raises(IntegrityError, match="digest"):
        StateLayout.from_json(data)
    with pytest.raises(ProtocolError):
        StateLayout.decode(b"\xff")


def test_differences_name_what_changed():
    left = StateLayout.of([("a", "float32", (2,)), ("b", "float32", (1,))])
    right = StateLayout.of([("a", "float32", (3,)), ("c", "float32", (1,))])
    words = " ".join(left.differences(right))
    assert "a: float32[2] became float32[3]" in words
    assert "b: float32[1] became nothing" in words
    assert left.differences(left) == []
    assert left.differences(right, limit=1)[-1] == "and 2 more"


@given(
    tensors,
    st.sampled_from([1, 5, 64, 100, 4096]),
    st.sets(st.integers(0, 11)),
    st.integers(1, 4),
)
def test_the_units_of_all_shares_write_every_byte_once(found, chunk, whole, replicas):
    layout = layout_of(found)
    total = chunk_count(layout.total_bytes, chunk)
    seen, chunks = bytearray(layout.total_bytes), list[int]()
    for index in range(replicas):
        part = Share(index, replicas).chunks(total)
        first, end = part.start * chunk, min(part.stop * chunk, layout.total_bytes)
        assert end - first <= Share(index, replicas).bytes_max(layout.total_bytes, chunk)
        for unit in units(layout, chunk, whole, part):
            chunks += (part.start + c for c in unit.chunks)
            low, high = unit.chunks[0] * chunk, (unit.chunks[-1] + 1) * chunk
            for piece in unit.pieces:
                assert low <= piece.at
                assert piece.at + piece.count <= high
                for at in range(piece.at, piece.at + piece.count):
                    seen[first + at] += 1
                if piece.entry != PADDING:
                    entry = layout.entries[piece.entry]
                    assert first + piece.at == entry.at + piece.offset
                    if piece.entry in whole:  # cut by the bounds of the part alone
                        assert piece.offset == 0 or piece.at == 0
                        assert piece.offset + piece.count in (entry.bytes, end - entry.at)
    assert set(seen) <= {1}
    assert chunks == list(range(total))


@given(st.integers(0, 50), st.integers(1, 9))
def test_shares_differ_by_a_chunk_at_most(chunks, replicas):
    sizes = [len(Share(i, replicas).chunks(chunks)) for i in range(replicas)]
    assert sum(sizes) == chunks
    assert max(sizes) - min(sizes) <= 1
    with pytest.raises(ValueError, match="no share"):
        Share(replicas, replicas)


@given(tensors, st.integers(1, 200))
def test_scatter_undoes_any_cut(found, block):
    layout = layout_of(found)
    data = bytes(i % 251 for i in range(layout.total_bytes))
    targets = [memoryview(bytearray(e.bytes)) for e in layout.entries]
    scatter(layout, [data[i : i + block] for i in range(0, len(data), block)], targets)
    for entry, target in zip(layout.entries, targets, strict=True):
        assert bytes(target) == data[entry.at : entry.at + entry.bytes]


def test_scatter_refuses_too_little_and_too_much():
    layout = StateLayout.of([("a", "uint8", (64,))])
    target = [memoryview(bytearray(64))]
    for count in (63, 65):
        with pytest.raises(IntegrityError, match=str(count)):
            scatter(layout, [bytes(count)], target)
    with pytest.raises(ValueError, match="targets"):
        scatter(layout, [bytes(64)], [])


def test_a_box_must_lie_in_its_tensor():
    box = Entry(name="a", dtype="uint8", shape=(2,), global_shape=(4,), offsets=(2,), at=0)
    assert StateLayout((box,)).total_bytes == 64
    with pytest.raises(ValueError, match="not inside"):
        StateLayout((replace(box, offsets=(3,)),))
