"""Save and load in one process, and what load leaves of the order of things."""

import json
from pathlib import Path

import pytest

from ftkit.checkpoint.persist.lease import Lease
from ftkit.checkpoint.persist.local_store import LocalStore
from ftkit.checkpoint.standalone import load, save
from ftkit.core.errors import CapacityError, IntegrityError, RootInUse, StateChanged, UsageError
from ftkit.core.ids import JobId

from .helpers import Training, assert_same


def trained(steps: int) -> Training:
    training = Training()
    for step in range(steps):
        training.train(step)
    return training


def saved(folder: Path, training: Training, step: int) -> None:
    save(
        folder,
        step,
        model=training.model,
        optimizer=training.optimizer,
        scheduler=training.scheduler,
        metrics={"loss": 1.0},
    )


def loaded(folder: Path, training: Training, step: int | None = None) -> int:
    return load(
        folder,
        step,
        model=training.model,
        optimizer=training.optimizer,
        scheduler=training.scheduler,
    )


def test_what_was_saved_comes_back_and_training_goes_on_alike(tmp_path: Path) -> None:
    first = trained(3)
    saved(tmp_path, first, 3)
    second = Training(seed=1)
    assert loaded(tmp_path, second) == 3
    assert_same(first.state, second.state)
    for step in (3, 4):
        first.train(step)
        second.train(step)
    assert_same(first.state, second.state)
    assert {p.name for p in tmp_path.iterdir()} == {"step-3", ".lease.lock", "lease.json"}


def test_the_optimizers_state_is_in_the_order_of_its_parameters(tmp_path: Path) -> None:
    first = trained(2)
    saved(tmp_path, first, 2)
    second = Training(seed=1)
    loaded(tmp_path, second)
    places = {id(p): i for i, p in enumerate(second.model.parameters())}
    order = [places[id(p)] for p in second.optimizer.state]
    assert order == sorted(order)
    assert len(order) == len(places)


def test_a_step_by_its_number_and_one_that_is_not_there(tmp_path: Path) -> None:
    training = trained(1)
    saved(tmp_path, training, 1)
    saved(tmp_path, training, 2)
    assert loaded(tmp_path, training, 1) == 1
    assert loaded(tmp_path, training) == 2
    with pytest.raises(UsageError, match=r"step 7 has no checkpoint .*\[1, 2\]"):
        loaded(tmp_path, training, 7)
    with pytest.raises(UsageError, match="step 2 is committed"):
        saved(tmp_path, training, 2)


def test_a_jobs_folder_is_not_written_to(tmp_path: Path) -> None:
    with (
        Lease.take(LocalStore(tmp_path), JobId("job")),
        pytest.raises(RootInUse, match="job 'job'"),
    ):
        saved(tmp_path, trained(1), 1)


def test_another_model_and_a_damaged_file_are_refused(tmp_path: Path) -> None:
    saved(tmp_path, trained(1), 1)
    with pytest.raises(StateChanged):
        loaded(tmp_path, Training(width=4))
    file = next(p for p in (tmp_path / "step-1/tensors").rglob("c*") if p.is_file())
    data = bytearray(file.read_bytes())
    data[0] ^= 1
    file.write_bytes(data)
    with pytest.raises(IntegrityError, match="is altered"):
        loaded(tmp_path, Training(seed=1))


def test_what_other_programs_wrote_is_not_taken_for_a_jobs_state(tmp_path: Path) -> None:
    saved(tmp_path, trained(1), 1)
    state = json.loads((tmp_path / "step-1/state.json").read_text())
    assert list(state) == ["0"], "keyed by the seat that saved it"


def test_a_save_that_fails_leaves_nothing_to_fill_the_disk(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        (tmp_path / "step-4" / "tensors").mkdir(parents=True)
        raise CapacityError("no room")

    monkeypatch.setattr("ftkit.checkpoint.standalone.write", full)
    with pytest.raises(CapacityError):
        save(tmp_path, 4, model=Training().model)
    assert not (tmp_path / "step-4").exists()
