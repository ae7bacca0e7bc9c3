"""DCP in one process over our store: round trips, partial loads, refusals, damage."""

import gc
import json
import pickle
import threading
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

from ftkit.checkpoint import FtkitStorageReader, FtkitStorageWriter
from ftkit.checkpoint.persist.checkpoint import open_checkpoint, steps
from ftkit.checkpoint.persist.lease import Lease
from ftkit.checkpoint.persist.local_store import LocalStore
from ftkit.core.errors import IntegrityError, RootInUse, UsageError
from ftkit.core.ids import JobId
from tests.checkpoint.ecosystem.states import assert_equal, blank, everything, model_and_optimizer
from tests.checkpoint.persist.stories import flip

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def save(root, step, state, **options):
    dcp.save(state, storage_writer=FtkitStorageWriter(root, step=step, **options))


def load(root, state, **options):
    reader = FtkitStorageReader(root, **options)
    dcp.load(state, storage_reader=reader)
    return reader


def cause(raised) -> BaseException:
    (failure,) = raised.value.failures.values()
    error: BaseException = failure[0]
    return error


def damage(root: Path, step: int, tensor: str) -> Path:
    """Turn over one bit of a tensor's first chunk."""
    file = (
        root
        / f"step-{step}"
        / next(r.file for r in open_checkpoint(LocalStore(root)).chunks[tensor])
    )
    file.write_bytes(flip(file.read_bytes(), 3))
    return file


def test_every_kind_of_value_comes_back_bit_for_bit(tmp_path):
    state = everything(seed=1)
    save(tmp_path, 7, state)
    again = blank(state)
    reader = load(tmp_path, again)
    assert reader.step == 7
    assert_equal(again, state)
    assert open_checkpoint(LocalStore(tmp_path), verify=True).step == 7


def test_a_model_and_its_optimizer(tmp_path):
    state = model_and_optimizer(seed=1)
    save(tmp_path, 1, state)
    again = model_and_optimizer(seed=2)
    load(tmp_path, again)
    assert_equal(again, state)
    names = open_checkpoint(LocalStore(tmp_path)).tensors
    assert {"model/0.weight", "optimizer/state/0.weight/exp_avg"} <= names.keys()


def test_async_save_stores_what_was_there_when_it_was_called(tmp_path):
    meeting = f"file://{tmp_path}/ranks"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=0, world_size=1)
    try:
        weight = torch.arange(1000.0)
        state = {"model": {"w": weight}, "step": 3}
        writer = FtkitStorageWriter(tmp_path)
        future = dcp.async_save(state, checkpoint_id="3", storage_writer=writer)
        weight.zero_()
        assert isinstance(future, Future)
        future.result(timeout=60)
        loaded = torch.empty(1000)
        again = {"model": {"w": loaded}, "step": 0}
        dcp.load(again, storage_reader=FtkitStorageReader(tmp_path))
    finally:
        torch.distributed.destroy_process_group()
    assert torch.equal(loaded, torch.arange(1000.0))
    assert again["step"] == 3


def test_one_writer_saves_many_steps_named_by_checkpoint_id(tmp_path):
    writer = FtkitStorageWriter(tmp_path)
    for step, name in [(1, "1"), (2, "step-2"), (3, str(tmp_path / "step-3"))]:
        dcp.save({"n": step}, checkpoint_id=name, storage_writer=writer)
    assert steps(LocalStore(tmp_path)) == [1, 2, 3]
    for name, expected in [("1", 1), ("step-2", 2), (str(tmp_path / "step-3"), 3)]:
        state = {"n": 0}
        dcp.load(state, checkpoint_id=name, storage_reader=FtkitStorageReader(tmp_path))
        assert state == {"n": expected}
    with pytest.raises(CheckpointException, match="not below"):
        dcp.save({"n": 4}, checkpoint_id="/elsewhere/step-4", storage_writer=writer)
    assert json.loads((tmp_path / "lease.json").read_text()) == {}, "it was given up"


def test_a_part_of_the_state_is_loaded_without_the_rest(tmp_path):
    state = everything(seed=1)
    save(tmp_path, 1, state)
    damage(tmp_path, 1, "model/weight")
    part = {"model": {"bias": torch.zeros_like(state["model"]["bias"])}}
    load(tmp_path, part)
    assert torch.equal(part["model"]["bias"], state["model"]["bias"])
    more = {"model": {"bias": torch.zeros_like(state["model"]["bias"]), "new": torch.ones(2)}}
    dcp.load(
        more,
        storage_reader=FtkitStorageReader(tmp_path),
        planner=DefaultLoadPlanner(allow_partial_load=True),
    )
    assert torch.equal(more["model"]["new"], torch.ones(2))
    with pytest.raises(CheckpointException, match=r"Missing key in checkpoint.*model\.new"):
        load(tmp_path, more)


def test_another_shape_is_refused_with_both(tmp_path):
    save(tmp_path, 1, {"w": torch.zeros(3, 4)})
    with pytest.raises(CheckpointException, match=r"\[3, 4\].*\[4, 3\].*for w"):
        load(tmp_path, {"w": torch.zeros(4, 3)})


def test_what_json_cannot_hold_is_refused_by_name_before_anything_is_written(tmp_path):
    with pytest.raises(CheckpointException) as raised:
        save(tmp_path, 1, {"model": {"w": torch.ones(3)}, "args": {"device": torch.device("cpu")}})
    assert isinstance(cause(raised), UsageError)
    assert "args.device is a device" in str(cause(raised))
    assert not any(p.name.startswith("c") for p in tmp_path.rglob("*"))
    with pytest.raises(CheckpointException) as raised:
        save(tmp_path, 1, {"w": torch.ones(3).to_sparse()})
    assert isinstance(cause(raised), UsageError)


def test_a_failed_save_does_not_keep_the_root_from_the_next(tmp_path):
    writer = FtkitStorageWriter(tmp_path)
    with pytest.raises(CheckpointException):
        dcp.save({"bad": object()}, checkpoint_id="1", storage_writer=writer)
    dcp.save({"good": 1}, checkpoint_id="1", storage_writer=writer)
    with pytest.raises(CheckpointException) as raised:
        save(tmp_path, 2, {"bad": object()})
    del raised
    gc.collect()
    save(tmp_path, 2, {"good": 2})
    assert open_checkpoint(LocalStore(tmp_path), verify=True).step == 2


def test_of_two_saves_that_overlap_the_second_is_refused_and_the_first_is_whole(tmp_path):
    writer = FtkitStorageWriter(tmp_path)
    refused = list[BaseException]()

    def second():
        with pytest.raises(CheckpointException) as raised:
            dcp.save({"w": torch.zeros(3)}, checkpoint_id="2", storage_writer=writer)
        refused.append(cause(raised))

    class Slow(dcp.DefaultSavePlanner):
        def resolve_data(self, write_item):
            thread = threading.Thread(target=second)
            thread.start()
            thread.join()
            return super().resolve_data(write_item)

    state = {"w": torch.ones(3)}
    dcp.save(state, checkpoint_id="1", storage_writer=writer, planner=Slow())
    assert [type(error) for error in refused] == [RootInUse]
    found = open_checkpoint(LocalStore(tmp_path), verify=True)
    assert found.step == 1
    again = blank(state)
    load(tmp_path, again)
    assert_equal(again, state)


def test_a_save_that_begins_during_another_does_not_change_its_step(tmp_path):
    writer = FtkitStorageWriter(tmp_path)

    class Slow(dcp.DefaultSavePlanner):
        def set_up_planner(self, state_dict, storage_meta=None, is_coordinator=False):
            state = {"n": 2}
            other = {"checkpoint_id": "2", "storage_writer": writer}
            thread = threading.Thread(target=dcp.save, args=(state,), kwargs=other)
            thread.start()
            thread.join()
            super().set_up_planner(state_dict, storage_meta, is_coordinator)

    dcp.save({"n": 1}, checkpoint_id="1", storage_writer=writer, planner=Slow())
    for step in (1, 2):
        again = {"n": 0}
        dcp.load(again, storage_reader=FtkitStorageReader(tmp_path, step=step))
        assert again == {"n": step}


def test_a_step_is_never_overwritten(tmp_path):
    save(tmp_path, 1, {"n": 1})
    with pytest.raises(CheckpointException) as raised:
        save(tmp_path, 1, {"n": 2})
    assert "never overwritten" in str(cause(raised))
    state = {"n": 0}
    load(tmp_path, state)
    assert state == {"n": 1}


def test_another_job_on_the_root_is_named(tmp_path):
    with (
        Lease.take(LocalStore(tmp_path), JobId("other")),
        pytest.raises(CheckpointException) as raised,
    ):
        save(tmp_path, 1, {"n": 1})
    assert isinstance(cause(raised), RootInUse)
    assert "'other'" in str(cause(raised))


def test_a_damaged_chunk_raises_and_names_chunk_and_file(tmp_path):
    save(tmp_path, 1, everything(seed=1))
    file = damage(tmp_path, 1, "model/weight")
    with pytest.raises(CheckpointException) as raised:
        load(tmp_path, blank(everything(seed=1)))
    assert isinstance(cause(raised), IntegrityError)
    assert str(file) in str(cause(raised))
    assert "'model/weight'" in str(cause(raised))


def test_a_damaged_chunk_falls_back_to_the_step_before_when_asked(tmp_path, caplog):
    for step in (1, 2, 3):
        save(tmp_path, step, everything(seed=step))
        if step > 1:
            damage(tmp_path, step, "model/weight")
    state = blank(everything(seed=1))
    reader = load(tmp_path, state, fallback=True)
    assert reader.step == 1
    assert_equal(state, everything(seed=1))
    assert "step 3 is passed over" in caplog.text
    assert "step 2 is passed over" in caplog.text


def test_fallback_ends_with_the_damage_when_no_older_step_is_good(tmp_path):
    save(tmp_path, 5, everything(seed=1))
    damage(tmp_path, 5, "model/weight")
    with pytest.raises(CheckpointException) as raised:
        load(tmp_path, blank(everything(seed=1)), fallback=True)
    assert isinstance(cause(raised), IntegrityError)


def test_fallback_does_not_mix_states_of_different_shape(tmp_path):
    save(tmp_path, 1, {"w": torch.zeros(4)})
    save(tmp_path, 2, {"w": torch.zeros(8)})
    damage(tmp_path, 2, "w")
    with pytest.raises(CheckpointException) as raised:
        load(tmp_path, {"w": torch.ones(8)}, fallback=True)
    assert "step 1 before it" in str(cause(raised))


def test_names_that_collide_are_refused(tmp_path):
    with pytest.raises(CheckpointException) as raised:
        save(tmp_path, 1, {"a/b": torch.ones(1), "a": {"b": torch.zeros(1)}})
    assert isinstance(cause(raised), UsageError)
    assert "'a/b'" in str(cause(raised))


def test_names_that_look_like_paths_stay_inside(tmp_path):
    root = tmp_path / "deep" / "root"
    state = {"../../evil": torch.ones(2), "..": {"/etc/passwd": torch.zeros(2)}}
    save(root, 1, state)
    again = blank(state)
    load(root, again)
    assert_equal(again, state)
    assert {p.name for p in tmp_path.iterdir()} == {"deep"}
    assert {p.name for p in (tmp_path / "deep").iterdir()} == {"root"}


def test_conversion_of_dtype_on_load_is_dcps(tmp_path):
    save(tmp_path, 1, {"w": torch.tensor([1.5, 2.5])})
    state = {"w": torch.zeros(2, dtype=torch.bfloat16)}
    load(tmp_path, state)
    assert torch.equal(state["w"], torch.tensor([1.5, 2.5], dtype=torch.bfloat16))


def test_cached_plans_save_step_after_step(tmp_path):
    writer = FtkitStorageWriter(tmp_path)
    for step in (1, 2):
        planner = dcp.DefaultSavePlanner(enable_plan_caching=True)
        planner._cached_plans_key = "test_cached_plans"
        dcp.save({"w": torch.full((4,), float(step))}, checkpoint_id=str(step),
                 storage_writer=writer, planner=planner)  # fmt: skip
    state = {"w": torch.zeros(4)}
    load(tmp_path, state)
    assert torch.equal(state["w"], torch.full((4,), 2.0))


def test_a_writer_goes_to_another_process_as_dcp_sends_it(tmp_path):
    writer = pickle.loads(pickle.dumps(FtkitStorageWriter(tmp_path, step=4)))
    dcp.save({"n": 1}, storage_writer=writer)
    assert steps(LocalStore(tmp_path)) == [4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "no root is named"),
        ({"root": "here"}, "which step of here"),
    ],
)
def test_a_save_that_says_not_where_is_refused(arguments, message):
    with pytest.raises(CheckpointException) as raised:
        dcp.save({"n": 1}, storage_writer=FtkitStorageWriter(**arguments))
    assert isinstance(cause(raised), UsageError)
    assert message in str(cause(raised))


def test_saving_without_collectives_is_refused(tmp_path):
    with pytest.raises(UsageError, match="nobody to commit"):
        dcp.save(
            {"n": 1}, storage_writer=FtkitStorageWriter(tmp_path, step=1), use_collectives=False
        )


def test_an_empty_root_says_so(tmp_path):
    with pytest.raises(CheckpointException, match="there is no checkpoint in"):
        load(tmp_path, {"n": 1})
