"""convert: every format to every other bit for bit, and hostile or damaged input."""

import collections
import json
import os
import pickle
import resource
import shutil
import signal
import weakref
import zipfile
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp

from ftkit.checkpoint import FtkitStorageReader, convert
from ftkit.checkpoint.ecosystem import dcp_folder, torch_file
from ftkit.checkpoint.ecosystem import safetensors as by_hand
from ftkit.checkpoint.ecosystem.convert import detect, of_ours
from ftkit.checkpoint.ecosystem.lazy import LazyState
from ftkit.checkpoint.persist.checkpoint import open_checkpoint
from ftkit.checkpoint.persist.commit import _sealed, begin, commit
from ftkit.checkpoint.persist.lease import Lease
from ftkit.checkpoint.persist.local_store import LocalStore
from ftkit.checkpoint.persist.plan import CheckpointPlan, pieces
from ftkit.checkpoint.persist.write import write
from ftkit.checkpoint.plain import decode
from ftkit.core.errors import CapacityError, FtkitError, IntegrityError, UsageError
from ftkit.core.ids import JobId, Step
from tests.checkpoint.ecosystem.states import (
    assert_equal,
    blank,
    everything,
    model_and_optimizer,
    raw,
)
from tests.checkpoint.helpers import Training
from tests.checkpoint.persist.stories import flip

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

FORMATS = ["ftkit", "safetensors", "dcp", "torch"]


def target(folder, form, name="made"):
    """A name for a checkpoint of that format."""
    return folder / name / "step-3" if form == "ftkit" else folder / f"{name}.{form}"


def contents(path, form):
    """The state dict at `path`, by the means of who knows the format."""
    if form == "torch":
        return torch.load(path, weights_only=True)
    if form == "ftkit":
        state = of_ours(open_checkpoint(LocalStore(path.parent), Step(3), verify=True))
        return decode(state.skeleton, lambda name: state.tensors[name].read())
    state = by_hand.read(path) if form == "safetensors" else dcp_folder.read(path)
    return decode(state.skeleton, lambda name: state.tensors[name].read())


@pytest.mark.parametrize("first", FORMATS)
@pytest.mark.parametrize("second", FORMATS)
def test_every_format_to_every_other_and_back(tmp_path, first, second):
    state = everything(seed=1)
    torch.save(state, tmp_path / "start.pt")
    one, two = target(tmp_path, first, "one"), target(tmp_path, second, "two")
    convert(tmp_path / "start.pt", one, to=first)
    done = convert(one, two, to=second)
    assert (done.source, done.target) == (first, second)
    assert done.nbytes == sum(len(raw(t)) for t in state["model"].values())
    assert_equal(contents(two, second), state)
    convert(two, tmp_path / "end.pt", to="torch")
    assert_equal(torch.load(tmp_path / "end.pt", weights_only=True), state)
    assert not [p for p in tmp_path.rglob("*") if ".part" in p.name]


def test_integer_keys_of_a_plain_optimizer_come_back_as_integers(tmp_path):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state, tmp_path / "a.pt")
    for form in ("ftkit", "safetensors"):
        convert(tmp_path / "a.pt", target(tmp_path, form), to=form)
        assert_equal(contents(target(tmp_path, form), form)["optimizer"], state["optimizer"])


def test_the_safetensors_package_reads_what_is_written_and_the_other_way(tmp_path):
    state = everything(seed=1)["model"]
    torch.save({"model": state}, tmp_path / "a.pt")
    convert(tmp_path / "a.pt", tmp_path / "m.safetensors", to="safetensors", part="model")
    assert_equal(
        dict(sorted(safetensors.torch.load_file(tmp_path / "m.safetensors").items())),
        dict(sorted(state.items())),
    )
    theirs = {k: v.contiguous() for k, v in state.items()}
    safetensors.torch.save_file(theirs, tmp_path / "theirs.safetensors")
    convert(tmp_path / "theirs.safetensors", tmp_path / "ours" / "step-3", to="ftkit", part="model")
    names = open_checkpoint(LocalStore(tmp_path / "ours")).tensors
    assert names.keys() == {f"model/{key}" for key in state}
    found = contents(tmp_path / "ours" / "step-3", "ftkit")["model"]
    assert_equal(dict(sorted(found.items())), dict(sorted(state.items())))


def test_torch_and_dcp_themselves_read_what_is_written(tmp_path):
    state = model_and_optimizer(seed=1)
    dcp.save(state, checkpoint_id=tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours" / "step-3", to="ftkit")
    convert(tmp_path / "ours", tmp_path / "again", to="dcp")
    for load in (
        lambda s: dcp.load(s, checkpoint_id=tmp_path / "again"),
        lambda s: dcp.load(s, storage_reader=FtkitStorageReader(tmp_path / "ours")),
    ):
        found = model_and_optimizer(seed=2)
        load(found)
        assert_equal(found, state)
    assert zipfile.ZipFile(_torch(tmp_path / "x.pt", state)).testzip() is None


def _torch(path, state):
    with path.open("wb") as file:
        torch_file.write(file, LazyState.of(state, "state"), path.parent)
    return path


def test_a_training_jobs_checkpoint_has_the_usual_keys(tmp_path):
    training = Training(seed=1)
    for step in (1, 2, 3):
        training.train(step)
    layout, small = training.state.layout(), training.state.small()
    data = bytearray(layout.total_bytes)
    for entry, tensor in zip(layout.entries, training.state.tensors(), strict=True):
        data[entry.at : entry.at + entry.bytes] = raw(tensor)
    store = LocalStore(tmp_path / "job")
    plan = CheckpointPlan.of(layout.entries)
    with Lease.take(store, JobId("job")) as lease:
        begin(store, Step(3), lease)
        fragment = write(store, Step(3), plan, pieces(layout, memoryview(data)), small={"0": small})
        commit(store, Step(3), plan, [fragment], lease)

    convert(tmp_path / "job", tmp_path / "a.pt", to="torch")
    found = torch.load(tmp_path / "a.pt", weights_only=True)
    assert found.keys() == {"model", "optimizer", "scheduler"}
    other = Training(seed=9)
    other.model.load_state_dict(found["model"], strict=False)
    for key, tensor in training.model.state_dict().items():
        assert torch.equal(other.model.state_dict()[key], tensor)
    assert found["optimizer"]["state"].keys() == dict(training.model.named_parameters()).keys()
    assert found["optimizer"]["param_groups"][0]["params"][0] == "0.weight"
    assert_equal(found["scheduler"], training.scheduler.state_dict())
    moments = {"optimizer": {"state": {"0.bias": {"exp_avg": torch.zeros(8)}}}}
    dcp.load(moments, storage_reader=FtkitStorageReader(tmp_path / "job"))
    live = training.optimizer.state[training.model.get_parameter("0.bias")]["exp_avg"]
    assert torch.equal(moments["optimizer"]["state"]["0.bias"]["exp_avg"], live)


def test_only_one_tensor_is_read_at_a_time(tmp_path, monkeypatch):
    """What has been read is dropped before the next is: no more than one is alive."""
    state = {str(i): torch.full((1000,), float(i)) for i in range(5)}
    torch.save(state, tmp_path / "a.pt")
    convert(tmp_path / "a.pt", tmp_path / "b" / "step-3", to="ftkit")
    alive, most = weakref.WeakSet[torch.Tensor](), list[int]()
    real = of_ours

    def watched(checkpoint):
        found = real(checkpoint)

        def counting(lazy):
            def read():
                tensor = lazy.read()
                alive.add(tensor)
                most.append(len(alive))
                return tensor

            return type(lazy)(lazy.dtype, lazy.shape, read)

        return LazyState(found.skeleton, {n: counting(t) for n, t in found.tensors.items()})

    monkeypatch.setitem(convert.__globals__, "of_ours", watched)
    for form in ("safetensors", "torch", "dcp", "ftkit"):
        most.clear()
        convert(tmp_path / "b", target(tmp_path, form, "c"), to=form)
        assert most
        assert max(most) <= 2, form  # the one being let go, and the next


def test_progress_is_told_the_total_and_every_tensor(tmp_path):
    torch.save(everything(seed=1), tmp_path / "a.pt")
    for form in FORMATS:
        totals, done = list[int](), list[int]()

        def begun(total, totals=totals, done=done):
            totals.append(total)
            return done.append

        convert(tmp_path / "a.pt", target(tmp_path, form), to=form, progress=begun)
        assert [sum(done)] == totals


# What is refused.


@pytest.mark.parametrize("form", FORMATS)
def test_nothing_is_overwritten(tmp_path, form):
    torch.save({"w": torch.ones(3)}, tmp_path / "a.pt")
    convert(tmp_path / "a.pt", target(tmp_path, form), to=form)
    torch.save({"w": torch.zeros(3)}, tmp_path / "b.pt")
    with pytest.raises(UsageError, match=r"exists|never overwritten"):
        convert(tmp_path / "b.pt", target(tmp_path, form), to=form)
    assert torch.equal(contents(target(tmp_path, form), form)["w"], torch.ones(3))


def test_bad_questions_get_answers(tmp_path):
    torch.save({"model": {"w": torch.ones(3)}, "n": 1}, tmp_path / "a.pt")
    a = tmp_path / "a.pt"
    questions: list[tuple[dict[str, Any], str]] = [
        ({"to": "onnx"}, "'onnx' is no format"),
        ({"to": "ftkit"}, "which step"),
        ({"to": "torch", "part": "ema"}, "no part 'ema'"),
        ({"to": "torch", "part": "n"}, "no part 'n'"),
    ]
    for arguments, words in questions:
        with pytest.raises(UsageError, match=words):
            convert(a, tmp_path / "out", **arguments)
    with pytest.raises(UsageError, match="nothing at"):
        convert(tmp_path / "nowhere", tmp_path / "out", to="torch")
    (tmp_path / "text").write_text("hello, this is not a checkpoint")
    with pytest.raises(UsageError, match="no safetensors file and none of"):
        convert(tmp_path / "text", tmp_path / "out", to="torch")
    with pytest.raises(UsageError, match="no checkpoint in"):
        convert(tmp_path, tmp_path / "out", to="torch")
    assert {p.name for p in tmp_path.iterdir()} == {"a.pt", "text"}


def test_keys_that_become_one_are_refused(tmp_path):
    torch.save({"a.b": torch.ones(1), "a": {"b": torch.zeros(1)}}, tmp_path / "dots.pt")
    torch.save({"a/b": torch.ones(1), "a": {"b": torch.zeros(1)}}, tmp_path / "slashes.pt")
    for form in ("safetensors", "dcp"):
        with pytest.raises(UsageError, match=r"a\.b"):
            convert(tmp_path / "dots.pt", target(tmp_path, form), to=form)
        assert not target(tmp_path, form).exists()
    convert(tmp_path / "dots.pt", target(tmp_path, "ftkit"), to="ftkit")
    with pytest.raises(UsageError, match="'a/b'"):
        convert(tmp_path / "slashes.pt", target(tmp_path, "torch"), to="torch")


def test_a_dtype_that_safetensors_lacks_is_named(tmp_path):
    torch.save({"z": torch.ones(2, dtype=torch.complex128)}, tmp_path / "a.pt")
    with pytest.raises(UsageError, match="'z' is complex128"):
        convert(tmp_path / "a.pt", tmp_path / "a.safetensors", to="safetensors")
    assert not (tmp_path / "a.safetensors").exists()


class Evil:
    def __reduce__(self):
        return os.mkdir, (os.environ["EVIL"],)


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """A folder that exists when hostile code has run."""
    monkeypatch.setenv("EVIL", str(tmp_path / "evil"))
    return tmp_path / "evil"


def test_a_hostile_torch_file_runs_nothing(tmp_path, evil):
    torch.save({"w": torch.ones(2), "x": Evil()}, tmp_path / "a.pt")
    with pytest.raises(UsageError, match="never unpickled"):
        convert(tmp_path / "a.pt", tmp_path / "out.pt", to="torch")
    assert not evil.exists()


class Reach:
    """Reaches for an attribute of something that may be named."""

    def __reduce__(self) -> tuple[object, ...]:
        return getattr, (collections.OrderedDict, "fromkeys")


def test_a_hostile_dcp_folder_runs_nothing(tmp_path, evil):
    folder = tmp_path / "dcp"
    dcp.save({"w": torch.ones(2), "n": 1}, checkpoint_id=folder)
    shutil.copytree(folder, tmp_path / "value")
    (folder / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(IntegrityError, match="hostile"):
        convert(folder, tmp_path / "out.pt", to="torch")
    (folder / ".metadata").write_bytes(pickle.dumps(Reach()))
    with pytest.raises(IntegrityError, match=r"'fromkeys' of .* has no place"):
        convert(folder, tmp_path / "out.pt", to="torch")
    dcp.save({"w": torch.ones(2), "n": Evil()}, checkpoint_id=tmp_path / "object")
    with pytest.raises(UsageError, match="n is damaged, or an object"):
        convert(tmp_path / "object", tmp_path / "out.pt", to="torch")
    assert not evil.exists()
    metadata = dcp.FileSystemReader(tmp_path / "value").read_metadata()
    for info in metadata.storage_data.values():
        info.relative_path = "../../" + info.relative_path
    (tmp_path / "value" / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(IntegrityError, match="leads out of"):
        convert(tmp_path / "value", tmp_path / "out.pt", to="torch")


@pytest.mark.parametrize("form", ["safetensors", "torch"])
def test_a_file_cut_short_anywhere_is_noticed(tmp_path, form):
    path = target(tmp_path, form)
    torch.save(everything(seed=1), tmp_path / "a.pt")
    convert(tmp_path / "a.pt", path, to=form)
    data = path.read_bytes()
    for size in sorted({*range(0, 40, 3), *range(0, len(data), len(data) // 40), len(data) - 1}):
        path.write_bytes(data[:size])
        with pytest.raises(FtkitError):
            convert(path, tmp_path / "out" / "step-1", to="ftkit")
        assert not (tmp_path / "out" / "step-1").exists(), size


def test_a_dcp_folder_cut_short_anywhere_is_noticed(tmp_path):
    folder = tmp_path / "dcp"
    dcp.save({"model": {"w": torch.randn(50, 4)}, "n": 1}, checkpoint_id=folder)
    for file in list(folder.iterdir()):
        data = file.read_bytes()
        for size in range(0, len(data), max(1, len(data) // 25)):
            file.write_bytes(data[:size])
            with pytest.raises(FtkitError):
                convert(folder, tmp_path / "out.pt", to="torch")
        file.write_bytes(data)
    convert(folder, tmp_path / "out.pt", to="torch")


def test_a_flipped_bit_in_a_torch_files_tensor_is_noticed(tmp_path):
    torch.save({"w": torch.arange(1000.0)}, tmp_path / "a.pt")
    data = (tmp_path / "a.pt").read_bytes()
    at = data.index(torch.arange(1000.0).numpy().tobytes())
    (tmp_path / "a.pt").write_bytes(flip(data, 8 * (at + 99) + 1))
    with pytest.raises(IntegrityError, match="another checksum"):
        convert(tmp_path / "a.pt", tmp_path / "b.pt", to="torch")


def test_a_damaged_checkpoint_of_ours_names_chunk_and_file_and_leaves_nothing(tmp_path):
    torch.save(everything(seed=1), tmp_path / "a.pt")
    convert(tmp_path / "a.pt", target(tmp_path, "ftkit"), to="ftkit")
    found = open_checkpoint(LocalStore(tmp_path / "made"))
    file = tmp_path / "made" / "step-3" / found.chunks["model/weight"][0].file
    file.write_bytes(flip(file.read_bytes(), 5))
    for form in ("safetensors", "dcp", "torch"):
        with pytest.raises(IntegrityError, match=r"'model/weight'") as raised:
            convert(tmp_path / "made", target(tmp_path, form), to=form)
        assert str(file) in str(raised.value)
    file.unlink()
    with pytest.raises(IntegrityError, match="missing"):
        convert(tmp_path / "made", tmp_path / "out.pt", to="torch")
    assert {p.name for p in tmp_path.iterdir()} == {"a.pt", "made"}


_A = b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'

HEADERS = [
    b"[]",
    b"{",
    b'{"a":1}',
    b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}',
    b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}',
    b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
    b'{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}',
    b"{" + _A + b"," + _A.replace(b'"a"', b'"b"') + b"}",
    b"{" + _A + b"," + _A + b"}",
    b"{" + _A + b',"__metadata__":{"ftkit":"{}"}}',
    b"{" + _A + b',"__metadata__":{"ftkit":"["}}',
    b"[" * 100_000,
]


@pytest.mark.parametrize("header", HEADERS, ids=range(len(HEADERS)))
def test_a_safetensors_header_that_lies_is_refused(tmp_path, header):
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(IntegrityError):
        by_hand.read(path)


def test_an_honest_header_is_read_and_an_unknown_dtype_named(tmp_path):
    path = tmp_path / "a.safetensors"
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert by_hand.read(path).tensors["a"].read().tolist() == [0.0]
    path.write_bytes(len(header).to_bytes(8, "little") + header.replace(b"F32", b"F4!") + bytes(4))
    with pytest.raises(UsageError, match="F4!"):
        by_hand.read(path)
    path.write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    with pytest.raises(IntegrityError, match="cut short"):
        by_hand.read(path)


def test_a_newer_format_of_ours_is_refused(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt")
    convert(tmp_path / "a.pt", target(tmp_path, "ftkit"), to="ftkit")
    record = tmp_path / "made" / "step-3" / "commit.json"
    record.write_bytes(_sealed(json.loads(record.read_bytes()) | {"version": 99}))
    with pytest.raises(UsageError, match="version 99"):
        convert(tmp_path / "made", tmp_path / "out.pt", to="torch")


def test_names_with_dots_stay_inside_in_every_format(tmp_path):
    state = {"../../evil": torch.ones(2), "/etc/x": torch.zeros(3)}
    torch.save(state, tmp_path / "a.pt")
    inner = tmp_path / "inner"
    inner.mkdir()
    for form in FORMATS:
        convert(tmp_path / "a.pt", target(inner, form), to=form)
        assert_equal(contents(target(inner, form), form), state)
    assert {p.name for p in tmp_path.iterdir()} == {"a.pt", "inner"}


@pytest.mark.parametrize("form", FORMATS)
def test_an_interrupt_leaves_no_half_result(tmp_path, form):
    torch.save(everything(seed=1), tmp_path / "a.pt")
    (tmp_path / "out").mkdir()
    goal = target(tmp_path / "out", form)
    seen = []

    def begun(total):
        def done(count):
            seen.append(count)
            if len(seen) == 4:
                signal.raise_signal(signal.SIGINT)

        return done

    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "a.pt", goal, to=form, progress=begun)
    assert len(seen) == 4
    left = {p.name for p in (tmp_path / "out").rglob("*")}
    assert left <= {
        "made",
        ".lease.lock",
        "lease.json",
    }  # of ours, the root that the next one will use
    convert(tmp_path / "a.pt", goal, to=form)
    assert detect(goal) == form


@pytest.fixture
def small_files():
    """Files larger than 64 kB cannot be written, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("form", FORMATS)
def test_a_full_disk_is_told_and_leaves_no_half_result(tmp_path, form, request):
    torch.save({"w": torch.zeros(1 << 16)}, tmp_path / "a.pt")
    request.getfixturevalue("small_files")
    with pytest.raises(CapacityError, match="full"):
        convert(tmp_path / "a.pt", target(tmp_path / "out", form), to=form)
    left = {p.name for p in (tmp_path / "out").rglob("*")}
    assert left <= {"made", ".lease.lock", "lease.json"}


def test_what_appeared_meanwhile_is_left_as_it_is(tmp_path):
    torch.save({"w": torch.ones(3)}, tmp_path / "a.pt")
    goal = tmp_path / "out.safetensors"

    def begun(total):
        return lambda _: goal.write_bytes(b"mine")

    with pytest.raises(UsageError, match="in the meantime"):
        convert(tmp_path / "a.pt", goal, to="safetensors", progress=begun)
    assert goal.read_bytes() == b"mine"
    assert {p.name for p in tmp_path.iterdir()} == {"a.pt", "out.safetensors"}


def test_a_torch_file_of_before_1_6_is_read(tmp_path):
    state = {"w": torch.randn(5), "n": 2}
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    convert(tmp_path / "old.pt", tmp_path / "new.pt", to="torch")
    assert_equal(torch.load(tmp_path / "new.pt", weights_only=True), state)


def test_blank_changes_what_is_compared():
    """The round trips would prove nothing if the comparison let blanks through."""
    state = everything(seed=1)
    with pytest.raises(AssertionError):
        assert_equal(blank(state), state)
