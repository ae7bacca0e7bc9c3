"""What is written is what is read: by ftkit, and by zarr and pyarrow alone."""

import itertools
import json
import uuid
import warnings
from math import prod

import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from ftkit.checkpoint.layout import ITEM_BYTES, StateLayout
from ftkit.checkpoint.persist.boxes import Box
from ftkit.checkpoint.persist.checkpoint import open_checkpoint, steps
from ftkit.checkpoint.persist.codecs import Codec, CodecPolicy
from ftkit.checkpoint.persist.commit import begin, commit
from ftkit.checkpoint.persist.compare import diff
from ftkit.checkpoint.persist.lease import Lease
from ftkit.checkpoint.persist.local_store import LocalStore
from ftkit.checkpoint.persist.plan import CheckpointPlan, pieces
from ftkit.checkpoint.persist.store import Buffer, open_store
from ftkit.checkpoint.persist.write import cut, write
from ftkit.checkpoint.persist.zarr_format import stored_dtype
from ftkit.core.errors import UsageError
from ftkit.core.ids import JobId, Step

from .stories import (
    CHUNK,
    MIXED,
    ModelStore,
    assert_holds,
    contents,
    newest,
    pieces_of,
    read,
    rows,
    save,
)
from .test_grid import cut_tensors

policies = st.sampled_from([CodecPolicy(small_bytes=0), CodecPolicy.none(),
                            CodecPolicy(by_dtype={}, otherwise=Codec.LZ4, small_bytes=0)])  # fmt: skip


@settings(deadline=None)  # the first one imports pyarrow's parquet
@given(st.lists(st.tuples(st.sampled_from(sorted(ITEM_BYTES)), cut_tensors()), max_size=4),
       policies, st.integers(1, 3), st.data())  # fmt: skip
def test_any_tensors_by_any_writers_come_back_by_any_box(found, codec, writers, data):
    tensors = [(f"t/{i}", dtype, *cut) for i, (dtype, cut) in enumerate(found)]
    store = ModelStore()
    save(store, 3, tensors=tensors, writers=writers, codec=codec)
    checkpoint = open_checkpoint(store)
    checkpoint.verify()
    assert_holds(checkpoint, 3, tensors)
    for name, dtype, shape, _ in tensors:
        lows = [data.draw(st.integers(0, n)) for n in shape]
        sizes = [data.draw(st.integers(0, n - low)) for n, low in zip(shape, lows, strict=True)]
        box = Box(tuple(lows), tuple(sizes))
        wanted = contents(name, dtype, shape, 3)[box.within(Box.whole(shape))]
        assert read(checkpoint, name, box) == wanted.tobytes()


NUMERIC = [
    (dtype, f"x/{dtype}", shape, boxes)
    for dtype in sorted(ITEM_BYTES)
    for shape, boxes in [((30, 9), rows((30, 9), 12, 12, 6)), ((), [Box.whole(())])]
]


@pytest.mark.parametrize("codec", list(Codec))
def test_plain_zarr_reads_every_dtype(tmp_path, codec):
    policy = CodecPolicy(by_dtype={}, otherwise=codec, small_bytes=0)
    tensors = [(f"{name}/{len(shape)}", dtype, shape, boxes)
               for dtype, name, shape, boxes in NUMERIC]  # fmt: skip
    save(LocalStore(tmp_path), 1, tensors=tensors, codec=policy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        group = zarr.open_group(tmp_path / "step-1" / "tensors", mode="r")
        members = dict(group.members())
    assert len(members) == len(tensors)
    by_name = {str(a.attrs["name"]): a for a in members.values()}
    for name, dtype, shape, _ in tensors:
        array = by_name[name]
        assert isinstance(array, zarr.Array)
        assert array.shape == shape
        assert array.dtype == np.dtype(stored_dtype(dtype))
        assert array.attrs["dtype"] == dtype
        assert np.asarray(array[...]).tobytes() == contents(name, dtype, shape, 1).tobytes()


def test_plain_zarr_notices_a_flipped_bit_and_reads_irregular_boxes(tmp_path):
    save(LocalStore(tmp_path), 1)
    group = zarr.open_group(tmp_path / "step-1" / "tensors", mode="r")
    boxes = group["model.uneven"]
    assert isinstance(boxes, zarr.Group)
    assert boxes.attrs["shape"] == [17, 3]
    whole = np.zeros((17, 3), dtype=np.int64)
    for _, array in boxes.arrays():
        at, size = np.array(array.attrs["offsets"], dtype=int), array.shape
        whole[at[0] : at[0] + size[0], at[1] : at[1] + size[1]] = array[...]
    assert whole.tobytes() == contents("model/uneven", "int64", (17, 3), 1).tobytes()
    shard = tmp_path / "step-1" / "tensors" / "model.weight" / "c.0.0"
    data = bytearray(shard.read_bytes())
    data[5] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ValueError, match="checksum"):
        group["model.weight"][...]  # type: ignore[index]


def test_plain_pyarrow_reads_a_manifest_that_accounts_for_every_byte(tmp_path):
    save(LocalStore(tmp_path), 1, writers=3)
    table = pq.read_table(tmp_path / "step-1" / "manifest.parquet").to_pylist()
    sizes = dict[str, int]()
    for row in table:
        assert row["at"] == sizes.get(row["file"], 0)
        sizes[row["file"]] = row["at"] + row["bytes"]
    for file, size in sizes.items():
        assert (tmp_path / "step-1" / file).stat().st_size == size
    chunks = [r for r in table if r["kind"] == "chunk" and r["tensor"] == "model/weight"]
    assert sum(prod(r["extents"]) for r in chunks) == 23 * 11
    record = json.loads((tmp_path / "step-1" / "commit.json").read_text())
    assert record["version"] == 1
    assert record["profile"]["tensor_bytes"] == sum(
        prod(shape) * ITEM_BYTES[dtype] for _, dtype, shape, _ in MIXED
    )


def test_a_box_costs_only_the_chunks_it_meets(tmp_path):
    store = LocalStore(tmp_path)
    save(store, 1)
    checkpoint = open_checkpoint(store)
    out = memoryview(bytearray(11 * 4))
    assert checkpoint.read("model/weight", Box((9, 0), (1, 11)), out) <= 256 + 4 + 100
    everything = memoryview(bytearray(23 * 11 * 4))
    assert checkpoint.read("model/weight", Box.whole((23, 11)), everything) > 23 * 11 * 4


def test_a_snapshot_is_saved_from_its_own_memory():
    layout = StateLayout.of([("a", "bfloat16", (5, 3)), ("b", "float32", ()), ("c", "int8", (0,))])
    data = memoryview(bytes(i % 251 for i in range(layout.total_bytes)))
    store, plan = ModelStore(), CheckpointPlan.of(layout.entries)
    with Lease.take(store, JobId("story")) as lease:
        written = write(store, Step(1), plan, pieces(layout, data))
        commit(store, Step(1), plan, [written], lease)
    found = open_checkpoint(store, verify=True)
    for entry in layout.entries:
        wanted = data[entry.at : entry.at + entry.bytes]
        assert read(found, entry.name, Box.whole(entry.shape)) == wanted


def in_pieces(store, piece_bytes):
    """What a writer asks to be admitted, and how much of the files there is each time."""
    asked = []

    def admit(nbytes):
        asked.append((nbytes, sum(store.sizes("step-1").values())))

    given = pieces_of(MIXED, 1)
    plan = CheckpointPlan.of(given, chunk_bytes=CHUNK)
    with Lease.take(store, JobId("j")) as lease:
        begin(store, Step(1), lease)
        fragment = write(store, Step(1), plan, given, admit=admit, piece_bytes=piece_bytes)
        commit(store, Step(1), plan, [fragment], lease)
    open_checkpoint(store).verify()
    return asked


def test_files_are_cut_into_pieces_of_which_each_is_admitted_before_it_is_written(tmp_path):
    cut = LocalStore(tmp_path / "cut")
    asked = in_pieces(cut, 100)
    files = in_pieces(whole := LocalStore(tmp_path / "whole"), None)
    assert max(n for n, _ in asked) == 100
    assert max(n for n, _ in files) > 100
    assert sum(n for n, _ in asked) == sum(n for n, _ in files)
    for (nbytes, before), (_, after) in itertools.pairwise(asked):
        assert after >= before + nbytes, "what was admitted is written before more is asked for"
    names = [name for name in whole.sizes("step-1/tensors") if "/c" in name]
    assert names
    for name in names:
        assert cut.get(f"step-1/tensors/{name}") == whole.get(f"step-1/tensors/{name}")


def test_an_object_is_admitted_whole():
    files = in_pieces(open_store(f"memory://ftkit/{uuid.uuid4()}"), 100)
    assert max(n for n, _ in files) > 100


def test_cutting_copies_nothing_and_loses_nothing():
    buffers: list[Buffer] = [b"abcd", b"", memoryview(b"efghij"), b"k"]
    pieces = cut(buffers, 3)
    assert [b"".join(p) for p in pieces] == [b"abc", b"def", b"ghi", b"jk"]
    assert cut([b""], 3) == [[]]


def test_the_newest_is_opened_and_others_by_their_step():
    store = ModelStore()
    for step in (2, 10, 9):
        save(store, step)
    assert newest(store).step == 10
    assert open_checkpoint(store, Step(9)).step == 9
    assert open_checkpoint(store, below=Step(10)).step == 9
    assert steps(store) == [2, 9, 10]
    with pytest.raises(UsageError, match=r"step 4 has no checkpoint.*\[2, 9, 10\]"):
        open_checkpoint(store, Step(4))


def test_diff_tells_tensors_apart_whatever_their_cut():
    store = ModelStore()
    save(store, 1)
    save(store, 2)
    other = [
        ("model/weight", "float32", (23, 11), [Box.whole((23, 11))]),  # cut otherwise
        ("model/half", "float16", (40, 60), [Box.whole((40, 60))]),
        ("new", "int8", (3,), [Box.whole((3,))]),
    ]
    one = open_checkpoint(store, Step(1))
    again = ModelStore()
    save(again, 1, tensors=other)
    found = diff(one, open_checkpoint(again))
    assert found.same == ("model/weight",)
    assert [str(b) for _, b in found.reshaped] == ["'model/half' float16[40, 60]"]
    assert found.only_right == ("new",)
    assert found.only_left == ("model/uneven", "nothing", "optimizer/step")
    assert found.small == ()
    later = diff(one, open_checkpoint(store, Step(2)))
    assert later.changed == ("model/half", "model/uneven", "model/weight", "optimizer/step")
    assert later.same == ("nothing",)
    assert later.small == ("0",)
    save(again, 2, tensors=other)
    changed = diff(one, open_checkpoint(again, Step(2)))
    assert changed.changed == ("model/weight",), "read and compared"


@given(st.binary(max_size=4096), st.sampled_from([1, 2, 4, 8, 16]))
def test_a_codec_undoes_itself(data, item):
    data = data[: len(data) // item * item]
    if not data:
        return
    for codec in Codec:
        out = bytearray(len(data))
        codec.unpack(memoryview(bytes(codec.pack(memoryview(data), item))), memoryview(out))
        assert out == data
