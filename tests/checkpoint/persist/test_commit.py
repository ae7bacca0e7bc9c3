"""Who may commit what: plans, fragments, leases, formats, paths."""

import json
import os
from dataclasses import replace

import pytest

from ftkit.checkpoint.persist import commit as committing
from ftkit.checkpoint.persist import manifest
from ftkit.checkpoint.persist.boxes import Box
from ftkit.checkpoint.persist.checkpoint import open_checkpoint
from ftkit.checkpoint.persist.commit import CommitRecord, begin, commit
from ftkit.checkpoint.persist.lease import LEASE, Holder, Lease, free
from ftkit.checkpoint.persist.local_store import LocalStore
from ftkit.checkpoint.persist.manifest import Fragment
from ftkit.checkpoint.persist.plan import CheckpointPlan, Piece
from ftkit.checkpoint.persist.store import Store, confined, open_store
from ftkit.checkpoint.persist.write import write
from ftkit.checkpoint.persist.zarr_format import array_paths
from ftkit.core.errors import (
    CapacityError,
    IntegrityError,
    ProtocolError,
    RootInUse,
    StoreError,
    UsageError,
)
from ftkit.core.ids import JobId, Step

from .stories import CHUNK, MIXED, ModelStore, assert_holds, newest, pieces_of, rows, save


@pytest.fixture
def store():
    return ModelStore()


@pytest.fixture
def lease(store):
    return Lease.take(store, JobId("story"))


def planned(seed=1):
    pieces = pieces_of(MIXED, seed)
    return pieces, CheckpointPlan.of(pieces, chunk_bytes=CHUNK)


def test_fragments_travel_and_are_committed_elsewhere(store, lease):
    pieces, plan = planned()
    sent = [
        write(store, Step(1), plan, pieces[i::2], small={str(i): {"step": 1}}).encode()
        for i in range(2)
    ]
    again = CheckpointPlan.of(reversed(pieces), chunk_bytes=CHUNK)
    record = commit(store, Step(1), again, map(Fragment.decode, sent), lease)
    assert_holds(newest(store))
    assert record.profile.tensor_bytes == sum(p.data.nbytes for p in pieces)
    assert record.profile.stored_bytes == sum(
        len(d) for n, d in store.files.items()
        if n.startswith("step-1/tensors/") and n.split("/")[2] not in ("zarr.json", "nothing")
        and n != "step-1/tensors/model.uneven/zarr.json"
    )  # fmt: skip
    for junk in (b"", b"junk", sent[0][:-40]):
        with pytest.raises(ProtocolError):
            Fragment.decode(junk)


def test_a_part_that_nobody_wrote_or_two_wrote_is_not_committed(store, lease):
    pieces, plan = planned()
    some = write(store, Step(1), plan, pieces[1:])
    with pytest.raises(UsageError, match=r"no writer wrote 'model/weight' from \[0, 0\]"):
        commit(store, Step(1), plan, [some], lease)
    first = write(ModelStore(), Step(1), plan, pieces[:2])
    with pytest.raises(UsageError, match="two writers wrote"):
        commit(store, Step(1), plan, [some, first], lease)
    assert "step-1/commit.json" not in store.files
    late = write(store, Step(1), plan, pieces[:1])
    commit(store, Step(1), plan, [some, late], lease)
    assert open_checkpoint(store).verify() > 0


def test_fragments_of_another_step_plan_or_key_are_refused(store, lease):
    pieces, plan = planned()
    good = write(store, Step(1), plan, pieces, small={"0": 1})
    for wrong in (replace(good, step=Step(2)), replace(good, plan_digest="0" * 16)):
        with pytest.raises(UsageError, match="a fragment is of step"):
            commit(store, Step(1), plan, [wrong], lease)
    with pytest.raises(UsageError, match=r"small state under \['0'\]"):
        commit(store, Step(1), plan, [good, replace(good, rows=())], lease)
    more = replace(good, rows=(*good.rows, good.rows[0]._replace(file="tensors/x/c")))
    with pytest.raises(UsageError, match="not in the plan"):
        commit(store, Step(1), plan, [more], lease)


def test_a_step_is_never_overwritten(store):
    pieces, plan = planned()
    save(store, 1)
    before = dict(store.files)
    with pytest.raises(UsageError, match="never overwritten"):
        begin(store, Step(1), Lease.take(store, JobId("story")))
    with pytest.raises(UsageError, match="never overwritten"):
        write(store, Step(1), plan, pieces)
    assert {n: d for n, d in store.files.items() if n != LEASE} == before


@pytest.mark.parametrize(
    ("boxes", "why"),
    [
        ([Box((0, 0), (3, 4))], r"'t' cannot be checkpointed: 4 of 16 elements"),
        ([Box((0, 0), (3, 4)), Box((2, 0), (2, 4))], "overlap"),
        ([Box((0, 0), (5, 4))], "not inside"),
    ],
)
def test_a_plan_names_the_tensor_that_its_boxes_do_not_cover(boxes, why):
    with pytest.raises(UsageError, match=why):
        CheckpointPlan.of(
            Piece("t", "int8", (4, 4), b.offsets, b.shape, memoryview(b"")) for b in boxes
        )


def test_a_piece_must_be_as_planned(store):
    a, b = (Piece("t", "int8", (4,), x.offsets, x.shape, memoryview(bytes(2)))
            for x in rows((4,), 2, 2))  # fmt: skip
    plan = CheckpointPlan.of([a, b])
    for wrong, why in (
        (a._replace(name="u"), "'u' is not in the plan"),
        (a._replace(dtype="bool"), r"'t' is bool\[4\], but was planned as int8\[4\]"),
        (a._replace(global_shape=(5,)), r"int8\[5\]"),
        (a._replace(shape=(1,), data=memoryview(b"1")), "not one of those"),
        (a._replace(data=memoryview(bytes(3))), "needs 2 bytes, its memory has 3"),
    ):
        with pytest.raises(UsageError, match=why):
            write(store, Step(1), plan, [wrong])
    with pytest.raises(UsageError, match=r"int8\[4\] to one writer and bool\[4\]"):
        CheckpointPlan.of([a, b._replace(dtype="bool")])
    with pytest.raises(UsageError, match="float31"):
        CheckpointPlan.of([a._replace(dtype="float31")])


def test_reading_what_is_not_there_is_the_callers_mistake(store):
    save(store, 1)
    found = open_checkpoint(store)
    out = memoryview(bytearray(44))
    for name, box, why in (
        ("model/weights", Box((0, 0), (1, 11)), "no tensor 'model/weights'"),
        ("model/weight", Box((23, 0), (1, 11)), "has no box"),
        ("model/weight", Box((0,), (11,)), "has no box"),
        ("model/weight", Box((0, 0), (2, 11)), "needs 88 bytes"),
    ):
        with pytest.raises(UsageError, match=why):
            found.read(name, box, out)
    with pytest.raises(UsageError, match="no checkpoint in model"):
        open_checkpoint(ModelStore())


def test_a_newer_format_is_refused_and_not_passed_over(store, monkeypatch):
    save(store, 1)
    with monkeypatch.context() as patch:
        patch.setattr(committing, "VERSION", 2)
        save(store, 2)
    with pytest.raises(UsageError, match=r"step 2 has format version 2, this ftkit reads 1"):
        open_checkpoint(store)
    assert open_checkpoint(store, Step(1)).step == 1


def test_a_record_that_says_too_little_is_damaged(store):
    save(store, 1)
    value = json.loads(store.files["step-1/commit.json"])
    del value["written_at"]
    assert CommitRecord.decode(committing._sealed(value)).written_at is None, "an older one"
    del value["metrics"]
    with pytest.raises(IntegrityError, match="lacks"):
        CommitRecord.decode(committing._sealed(value))
    for junk in (b"", b"[]", b"{}", b"\xff", b"[" * 100000):
        with pytest.raises(IntegrityError):
            CommitRecord.decode(junk)


@pytest.mark.parametrize(
    "wrong",
    [
        {"metrics": [1]},
        {"metrics": {"loss": "low"}},
        {"written_at": "yesterday"},
        {"profile": None},
        {"profile": {"codec_s": "long"}},
        {"files": ["manifest.parquet"]},
    ],
)
def test_a_record_of_other_kinds_of_values_is_damaged(store, wrong):
    save(store, 1)
    value = json.loads(store.files["step-1/commit.json"])
    with pytest.raises(IntegrityError, match="lacks what it must say"):
        CommitRecord.decode(committing._sealed(value | wrong))


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"shape": (2**31, 2**31)}, "in another"),
        ({"tensor": "another"}, "chunks hold"),
        ({"extents": (1, 1)}, "chunks hold"),
    ],
)
def test_a_manifest_whose_rows_make_no_tensor_is_damaged(store, wrong, why):
    save(store, 1)
    found = list(newest(store).rows)
    at = next(i for i, r in enumerate(found) if r.kind == "chunk" and len(r.shape) == 2)
    found[at] = found[at]._replace(**wrong)
    with pytest.raises(IntegrityError, match=why):
        manifest.decode(manifest.encode(found))


def test_small_state_that_is_no_object_is_damaged(store):
    save(store, 1)
    record = json.loads(store.files["step-1/commit.json"])
    store.files["step-1/state.json"] = b"null"
    record["files"]["state.json"] = [4, committing.digest(b"null")]
    store.files["step-1/commit.json"] = committing._sealed(record)
    with pytest.raises(IntegrityError, match="no object"):
        open_checkpoint(store, Step(1))


def test_a_checkpoint_under_another_steps_name_is_refused(store):
    save(store, 1)
    moved = ModelStore()
    moved.files = {n.replace("step-1/", "step-7/"): d for n, d in store.files.items()}
    with pytest.raises(IntegrityError, match="is that of step 1"):
        open_checkpoint(moved)


# Paths


@pytest.mark.parametrize(
    "path", ["../x", "/etc/passwd", "a/../../x", "", "a//b", ".", "a\\b", "a\0"]
)
def test_no_path_leads_outside(path, tmp_path):
    with pytest.raises(IntegrityError, match="refused"):
        confined(path)
    (tmp_path / "x").write_text("secret")
    with pytest.raises(IntegrityError):
        LocalStore(tmp_path / "root").get(path)


def test_a_manifest_that_points_outside_is_refused(store):
    save(store, 1)
    found = open_checkpoint(store).rows
    for changed in (
        found[0]._replace(file="../../secret"),
        found[0]._replace(dtype="float31"),
        found[0]._replace(codec="pickle"),
        found[0]._replace(kind="virus"),
        found[0]._replace(offsets=(99,) * len(found[0].shape)),
        found[0]._replace(at=-1),
    ):
        with pytest.raises(IntegrityError):
            manifest.decode(manifest.encode([changed]))


def test_a_link_does_not_lead_outside(tmp_path):
    (tmp_path / "secret").write_text("secret")
    store = LocalStore(tmp_path / "root")
    save(store, 1)
    target = tmp_path / "root" / "step-1" / "state.json"
    target.unlink()
    target.symlink_to(tmp_path / "secret")
    with pytest.raises(IntegrityError, match="through a link"):
        open_checkpoint(store)


def test_names_of_tensors_are_only_names():
    names = ["../../etc", "a/b", "a.b", "A.B", "", "zarr.json", ".", "..", "x" * 500, "é/ü", "__x"]
    paths = array_paths(names)
    assert len({p.casefold() for p in paths.values()}) == len(names)
    for path in paths.values():
        assert confined(path) == path
        assert "/" not in path
        assert len(path) < 200
        assert not path.startswith((".", "-", "__"))
    assert array_paths(["model/0.weight"]) == {"model/0.weight": "model.0.weight"}
    assert array_paths(reversed(names)) == paths


def test_tensors_of_any_name_are_saved(tmp_path):
    odd = [(n, "int8", (3,), [Box.whole((3,))]) for n in ("../x", "a/b", "a.b", "A.b", "", "\n")]
    save(LocalStore(tmp_path), 1, tensors=odd)
    found = open_checkpoint(LocalStore(tmp_path))
    found.verify()
    assert_holds(found, 1, odd)
    assert sorted(os.listdir(tmp_path)) == [".lease.lock", LEASE, "step-1"]


def test_an_unknown_kind_of_store_is_named():
    with pytest.raises(StoreError, match="nonsense"):
        open_store("nonsense://x/y")


# Leases

ME = Holder(job="me", host="a", boot="1", pid=1, started=0, nonce="x", renewed_at=100.0,
            term_s=10.0)  # fmt: skip
THEM = replace(ME, job="them")


@pytest.mark.parametrize(
    ("holder", "alive", "is_free"),
    [
        (replace(THEM, renewed_at=95.0), True, False),
        (replace(THEM, renewed_at=95.0), False, True),
        (replace(THEM, renewed_at=95.0, boot="0"), True, True),
        (replace(THEM, renewed_at=95.0, host="b"), False, False),  # nobody here can tell
        (replace(THEM, renewed_at=89.0, host="b"), True, True),
        (replace(THEM, renewed_at=89.0), True, True),
        (replace(ME, renewed_at=95.0, host="b", nonce="y"), True, True),  # of the same job
    ],
)
def test_whose_lease_may_be_taken_over(holder, alive, is_free):
    assert free(holder, ME, alive=lambda _: alive) is is_free


@pytest.mark.parametrize("kind", ["model", "local", "memory"])
def test_a_second_job_is_refused_and_told_by_whom(kind, tmp_path):
    stores: dict[str, Store] = {
        "model": ModelStore(),
        "local": LocalStore(tmp_path),
        "memory": open_store(f"memory://lease/{tmp_path.name}"),
    }
    store = stores[kind]
    now = [1000.0]
    first = Lease.take(store, JobId("first"), wall=lambda: now[0])
    with pytest.raises(RootInUse, match=rf"job 'first' \(process {os.getpid()} on .* in 60 s"):
        Lease.take(store, JobId("second"), wall=lambda: now[0])
    now[0] += 40
    first.check()
    now[0] += 40
    with pytest.raises(RootInUse):
        Lease.take(store, JobId("second"), wall=lambda: now[0])
    now[0] += 30
    second = Lease.take(store, JobId("second"), wall=lambda: now[0])
    with pytest.raises(RootInUse, match="taken over by job 'second'"):
        first.check()
    first.release()  # which is not its to give up
    second.check()
    second.release()
    Lease.take(store, JobId("third"), wall=lambda: now[0]).release()


def test_a_lease_is_kept_through_long_work_and_asked_for_no_more_than_needed(store):
    now = [0.0]
    first = Lease.take(store, JobId("first"), term_s=60.0, wall=lambda: now[0])
    renewed = list[float]()
    for item in first.kept_while(range(30)):
        assert item * 7 == now[0]
        renewed += [first.checked_at] if first.checked_at not in renewed else []
        now[0] += 7
        with pytest.raises(RootInUse):
            Lease.take(store, JobId("second"), wall=lambda: now[0])
    assert renewed == [0, 21, 42, 63, 84, 105, 126, 147, 168, 189]


def test_a_lease_that_was_lost_commits_nothing(store):
    pieces, plan = planned()
    now = [0.0]
    first = Lease.take(store, JobId("first"), wall=lambda: now[0])
    fragment = write(store, Step(1), plan, pieces)
    now[0] += 61
    Lease.take(store, JobId("second"), wall=lambda: now[0])
    with pytest.raises(RootInUse):
        commit(store, Step(1), plan, [fragment], first)
    with pytest.raises(RootInUse):
        begin(store, Step(2), first)
    assert "step-1/commit.json" not in store.files


@pytest.mark.multiproc
def test_the_lease_of_a_dead_process_is_free(tmp_path):
    store = LocalStore(tmp_path)
    pid = os.fork()
    if pid == 0:
        try:
            Lease.take(store, JobId("dead"))
        finally:
            os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    held = store.get(LEASE)
    assert json.loads(held)["pid"] == pid
    Lease.take(store, JobId("next")).check()  # though it is a zombie still
    os.waitpid(pid, 0)
    store.put(LEASE, held)
    Lease.take(store, JobId("next")).check()


def test_the_lease_needs_no_room_on_a_disk_where_it_once_lay(tmp_path, monkeypatch):
    store = LocalStore(tmp_path)
    held = Lease.take(store, JobId("one"))

    def full(*args, **kwargs):
        raise CapacityError("no room for another file")

    monkeypatch.setattr(LocalStore, "put", full)
    size = (tmp_path / LEASE).stat().st_size
    held.check()
    with pytest.raises(RootInUse):
        Lease.take(store, JobId("two"))
    held.release()
    Lease.take(store, JobId("two with a name that is far longer")).check()
    with pytest.raises(RootInUse, match="taken over by job 'two with"):
        held.check()
    assert (tmp_path / LEASE).stat().st_size == size


def test_a_lease_file_of_nonsense_holds_nothing(store):
    store.files[LEASE] = b"{"
    Lease.take(store, JobId("next")).check()
