"""What every kind of store must do; the model the crash tests use included."""

import uuid
from collections.abc import Iterator

import pytest

from ftkit.checkpoint.persist.checkpoint import open_checkpoint
from ftkit.checkpoint.persist.gc import gc
from ftkit.checkpoint.persist.lease import Lease
from ftkit.checkpoint.persist.retention import KeepLast
from ftkit.checkpoint.persist.store import Store, open_store
from ftkit.core.errors import FtkitError, IntegrityError, RootInUse, StoreError
from ftkit.core.ids import JobId
from tests.object_store import BUCKET, options, s3_server

from .stories import ModelStore, newest, save

KINDS = ["model", "local", "file", "memory", "s3"]


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, object]]:
    """How to open a store in the bucket of an S3-compatible server."""
    with s3_server() as environ:
        yield options(environ)


@pytest.fixture(params=KINDS)
def store(request, tmp_path) -> Store:
    match request.param:
        case "model":
            return ModelStore()
        case "local":
            return open_store(tmp_path / "root")
        case "file":
            return open_store(f"file://{tmp_path}/root")
        case "memory":
            return open_store(f"memory://ftkit/{uuid.uuid4()}")
        case _:
            return open_store(f"s3://{BUCKET}/{uuid.uuid4()}", **request.getfixturevalue("s3"))


def test_files_of_a_batch_are_there_after_its_flush(store):
    assert store.names() == []
    assert store.sizes("a") == {}
    with store.batch() as batch:
        batch.create("a/b/one", [b"12", memoryview(b"345"), b""])
        batch.create("a/two", [b""])
        batch.flush()
    assert store.get("a/b/one") == b"12345"
    assert store.sizes("a") == {"b/one": 5, "two": 0}
    assert store.names() == ["a"]


def test_a_file_may_be_written_in_parts(store):
    with store.batch() as batch:
        batch.create("a/x", [b"12", b"3"], more=True)
        batch.extend([memoryview(b"45")], more=True)
        batch.extend([b"6", b""])
        batch.create("a/y", [b"7"])
        batch.flush()
    assert (store.get("a/x"), store.get("a/y")) == (b"123456", b"7")


def test_ranges_are_read_into_buffers_one_after_another(store):
    store.put("a/x", b"0123456789")
    into = [memoryview(bytearray(3)), memoryview(bytearray(0)), memoryview(bytearray(2))]
    assert store.read("a/x", 4, into) == 5
    assert [bytes(v) for v in into] == [b"456", b"", b"78"]
    assert store.read("a/x", 8, into) == 2, "the end"
    for missing in ("a/y", "a/x/z", "b"):
        with pytest.raises(FileNotFoundError):
            store.read(missing, 0, into)
        with pytest.raises(FileNotFoundError):
            store.get(missing)


def test_put_replaces_unless_it_is_exclusive(store):
    store.put("x", b"1", exclusive=True)
    with pytest.raises(FileExistsError):
        store.put("x", b"2", exclusive=True)
    assert store.get("x") == b"1"
    store.put("x", b"3")
    assert store.get("x") == b"3"
    assert store.names() == ["x"], "no remains of writing"


def test_what_is_removed_is_gone(store):
    for path in ("a/b/c", "a/d", "ab/e"):
        store.put(path, b"1")
    store.remove("a/d")
    store.remove("a/d")
    assert store.sizes("a") == {"b/c": 1}
    store.remove_tree("a")
    store.remove_tree("a")
    assert store.sizes("a") == {}
    assert store.sizes("ab") == {"e": 1}
    for action in (store.remove, store.get):
        with pytest.raises(IntegrityError):
            action("../x")


def test_a_batch_overwrites_nothing(store):
    store.put("a/x", b"1")
    with pytest.raises(StoreError, match="a/x"), store.batch() as batch:  # noqa: PT012
        batch.create("a/x", [b"2"])
        batch.flush()
    assert store.get("a/x") == b"1"


def test_a_checkpoint_from_save_to_gc(store):
    for step in (1, 2):
        save(store, step, writers=2)
    found = newest(store)
    assert found.step == 2
    assert found.record.profile.files > 0
    with Lease.take(store, JobId("one")) as lease:
        with pytest.raises(RootInUse):
            Lease.take(store, JobId("two"))
        assert gc(store, [KeepLast(1)], lease).removed == (1,)
    assert store.names() in (["step-2"], [".lease.lock", "lease.json", "step-2"])
    name = "step-2/tensors/model.weight/c.0.0"
    store.put(name, bytes(len(store.get(name))))
    with pytest.raises(IntegrityError, match=r"model\.weight/c\.0\.0"):
        open_checkpoint(store).verify()


def test_a_store_that_is_gone_is_an_error_and_not_an_empty_one(s3):
    store = open_store("s3://no-such-bucket/x", **s3)
    for action in (lambda: save(store, 1), lambda: open_checkpoint(store)):
        with pytest.raises(FtkitError):
            action()
