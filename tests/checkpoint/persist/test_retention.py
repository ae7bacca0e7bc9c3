"""What policies keep, and what `gc` removes: never the newest good one, never without the lease."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftkit.checkpoint.persist.checkpoint import open_checkpoint, steps
from ftkit.checkpoint.persist.gc import gc
from ftkit.checkpoint.persist.keep import policies as policies_of
from ftkit.checkpoint.persist.lease import Lease
from ftkit.checkpoint.persist.retention import (
    KeepBest,
    KeepEvery,
    KeepLast,
    Kept,
    to_keep,
)
from ftkit.core.errors import RootInUse, UsageError
from ftkit.core.ids import JobId, Step

from .stories import ModelStore, newest, save

LOSSES = [Kept(step=Step(s), metrics={"loss": v}) for s, v in
          [(10, 3.0), (20, 1.0), (30, 2.0), (35, 1.0), (40, None)]]  # fmt: skip


@pytest.mark.parametrize(
    ("policies", "kept"),
    [
        ([], {10, 20, 30, 35, 40}),
        ([KeepLast(2)], {35, 40}),
        ([KeepEvery(20)], {20, 40}),
        ([KeepEvery(30)], {30, 40}),  # and the newest, always
        ([KeepBest(metric="loss")], {35, 40}),
        ([KeepBest(metric="loss", count=3)], {20, 30, 35, 40}),
        ([KeepBest(metric="loss", largest=True)], {10, 40}),
        ([KeepBest(metric="accuracy")], {40}),
        ([KeepLast(2), KeepEvery(30), KeepBest(metric="loss", largest=True)], {10, 30, 35, 40}),
    ],
)
def test_what_is_kept(policies, kept):
    assert to_keep(reversed(LOSSES), policies) == kept


@given(st.sets(st.integers(0, 50)), st.integers(1, 5), st.integers(1, 9))
def test_the_newest_is_always_kept(found, last, every):
    kept = to_keep([Kept(step=Step(s)) for s in found], [KeepLast(last), KeepEvery(every)])
    assert kept == {s for s in found if s % every == 0} | set(sorted(found)[-last:])


def test_policies_that_keep_nothing_are_refused():
    with pytest.raises(ValueError, match="KeepLast"):
        KeepLast(0)
    with pytest.raises(ValueError, match="KeepEvery"):
        KeepEvery(0)
    with pytest.raises(ValueError, match="KeepBest"):
        KeepBest(metric="m", count=0)


def collect(store, *policies, **options):
    with Lease.take(store, JobId("story")) as lease:
        return gc(store, policies, lease, **options)


def test_gc_removes_what_no_policy_wants_and_what_was_never_committed():
    store = ModelStore()
    for step, loss in ((1, 5.0), (2, 1.0), (3, float("nan")), (4, 2.0)):
        save(store, step, metrics={"loss": loss})
    store.files["step-5/tensors/a/c.0"] = b"a writer died"
    store.files["step-6/tensors/a/c.0"] = b"a writer lives"
    store.files[".part-123"] = b"the same, while it wrote its lease"
    found = collect(store, KeepLast(1), KeepBest(metric="loss"), in_flight=[Step(6)])
    assert found.kept == (2, 4)
    assert found.removed == (1, 3)
    assert found.partial == (5,)
    assert store.names() == ["step-2", "step-4", "step-6"]
    assert newest(store).step == 4
    assert open_checkpoint(store, Step(2)).verify() > 0


def test_nothing_older_goes_for_the_sake_of_a_damaged_newest():
    store = ModelStore()
    for step in (1, 2, 3):
        save(store, step)
    # Sizes are right and the record is good: only reading all of it shows the fault.
    name = "step-3/tensors/model.weight/c.1.0"
    store.files[name] = bytes(len(store.files[name]))
    found = collect(store, KeepLast(1))
    assert found.kept == (2,)
    assert found.removed == (1,)
    assert name in found.damaged[Step(3)]
    assert steps(store) == [2, 3], "what can be saved of 3 is not for gc to judge"
    store.files["step-2/manifest.parquet"] += b"?"
    save(store, 4)
    assert collect(store, KeepLast(9)).removed == (2,), "damaged, and older than a good one"


def test_gc_without_policies_keeps_all_that_is_committed():
    store = ModelStore()
    save(store, 1)
    save(store, 2)
    store.files["step-1/manifest.parquet"] += b"?"
    found = collect(store)
    assert found.kept == (2,)
    assert found.removed == ()
    assert steps(store) == [1, 2]


def test_gc_needs_the_lease():
    store = ModelStore()
    save(store, 1)
    now = [0.0]
    lost = Lease.take(store, JobId("first"), wall=lambda: now[0])
    now[0] += 61
    Lease.take(store, JobId("second"), wall=lambda: now[0])
    with pytest.raises(RootInUse):
        gc(store, [KeepLast(1)], lost)


def test_gc_keeps_the_lease_while_it_reads(monkeypatch):
    store = ModelStore()
    save(store, 1)
    now = [0.0]
    read = store.read

    def slow(*args):
        now[0] += 7
        with pytest.raises(RootInUse):
            Lease.take(store, JobId("second"), wall=lambda: now[0])
        return read(*args)

    monkeypatch.setattr(store, "read", slow)
    with Lease.take(store, JobId("first"), wall=lambda: now[0]) as lease:
        assert gc(store, [KeepLast(1)], lease).kept == (1,)
    assert now[0] > 60, "longer than a term"


def test_policies_as_a_person_writes_them():
    assert policies_of("") == []
    assert policies_of("last:3") == [KeepLast(3)]
    assert policies_of("last:1,every:500") == [KeepLast(1), KeepEvery(500)]
    assert policies_of("best:loss:2,best:score:max") == [
        KeepBest(metric="loss", count=2),
        KeepBest(metric="score", largest=True),
    ]


@pytest.mark.parametrize("text", ["3", "last", "last:", "last:0", "best:", "last:3,", "every:-1"])
def test_what_says_not_what_to_keep_is_refused(text):
    with pytest.raises(UsageError, match="no policy of retention"):
        policies_of(text)
