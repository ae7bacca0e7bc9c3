"""What a job can go on from, as the coordinator finds it out: whole, damaged, out of reach."""

import threading
from pathlib import Path

import pytest

from ftkit.checkpoint.persist import commit, source
from ftkit.checkpoint.persist.local_store import LocalStore
from ftkit.core.errors import RootInUse, StoreError, UsageError
from ftkit.core.ids import Step
from ftkit.launch import disk
from ftkit.launch.config import JobConfig
from ftkit.launch.disk import Disk, give_back, refuse_or_take
from tests.checkpoint.persist.stories import save

WAIT_S = 30.0


class Look:
    """One look, waited for."""

    def __init__(self, folder: Path | str) -> None:
        self.told: list[tuple[str, dict[str, object]]] = []
        self._done = threading.Event()
        config = JobConfig(job="j", command=("x",), checkpoint_dir=str(folder))
        self.disk = Disk(config, self._tell, changed=self._done.set)

    def steps(self) -> frozenset[Step] | None:
        self.disk.steps()  # begins to look
        assert self._done.wait(WAIT_S)
        return self.disk.steps()

    def again(self) -> None:
        self._done.clear()
        self.disk.forget()

    def _tell(self, kind: str, /, **fields: object) -> None:
        self.told.append((kind, fields))


def damage(folder: Path, step: int) -> None:
    file = next(p for p in (folder / f"step-{step}/tensors").rglob("c*") if p.is_file())
    data = bytearray(file.read_bytes())
    data[0] ^= 1
    file.write_bytes(data)


def test_without_a_place_there_is_nothing_and_nothing_is_looked_at() -> None:
    look = Look("")
    assert look.disk.steps() == frozenset()


def test_an_empty_place_has_nothing(tmp_path: Path) -> None:
    assert Look(tmp_path / "none").steps() == frozenset()
    assert not (tmp_path / "none").exists()


def test_the_newest_good_one_counts_and_damaged_ones_are_told(tmp_path: Path) -> None:
    for step in (1, 2):
        save(LocalStore(tmp_path), step)
    damage(tmp_path, 2)
    look = Look(tmp_path)
    assert look.steps() == frozenset({Step(1)})
    ((kind, fields),) = look.told
    assert (kind, fields["step"]) == ("checkpoint-skipped", 2)
    save(LocalStore(tmp_path), 3)
    assert look.disk.steps() == frozenset({Step(1)}), "the answer holds until it is used up"
    look.again()
    assert look.steps() == frozenset({Step(3)})


def test_when_all_are_damaged_the_job_does_not_begin_anew_by_itself(tmp_path: Path) -> None:
    save(LocalStore(tmp_path), 1)
    damage(tmp_path, 1)
    look = Look(tmp_path)
    assert look.steps() is None
    assert "every checkpoint" in look.disk.refused
    assert "--fresh" in look.disk.refused


def test_a_checkpoint_of_a_newer_format_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(LocalStore(tmp_path), 1)
    with monkeypatch.context() as patch:
        patch.setattr(commit, "VERSION", commit.VERSION + 1)
        save(LocalStore(tmp_path), 2)
    look = Look(tmp_path)
    assert look.steps() is None
    assert "step 2 has format version 2, this ftkit reads 1" in look.disk.refused


def test_a_store_that_fails_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(LocalStore(tmp_path), 1)
    real, failures = source.newest_good, [StoreError("EIO"), StoreError("EIO")]

    def failing(*args: object, **kwargs: object) -> source.Found:
        if failures:
            raise failures.pop()
        return real(*args, **kwargs)  # type: ignore[arg-type]  # passed on as they came

    monkeypatch.setattr(source, "newest_good", failing)
    monkeypatch.setattr(disk, "AGAIN_S", 0.0)
    look = Look(tmp_path)
    assert look.steps() == frozenset({Step(1)})
    assert [kind for kind, _ in look.told] == ["checkpoint-unread"] * 2


def test_what_nobody_expected_ends_the_job_rather_than_the_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*args: object, **kwargs: object) -> source.Found:
        raise KeyError("of a driver's")

    monkeypatch.setattr(source, "newest_good", failing)
    look = Look(tmp_path)
    assert look.steps() is None
    assert 'broke off with KeyError("of a driver\'s")' in look.disk.refused


def test_a_job_takes_the_lease_is_told_of_old_ones_and_gives_it_back(tmp_path: Path) -> None:
    save(LocalStore(tmp_path), 1)
    first = JobConfig(
        job="first", command=("x",), checkpoint_dir=str(tmp_path), checkpoint_fresh=True
    )
    second = JobConfig(job="second", command=("x",), checkpoint_dir=str(tmp_path))
    (old,) = refuse_or_take(first).checkpoint_ignore
    assert old == source.identity(LocalStore(tmp_path), Step(1))
    with pytest.raises(RootInUse, match="'first'"):
        refuse_or_take(second)
    give_back(second)  # not its own: nothing happens
    with pytest.raises(RootInUse, match="'first'"):
        refuse_or_take(second)
    give_back(first)
    assert refuse_or_take(second).checkpoint_ignore == ()
    give_back(second)


def test_a_place_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = JobConfig(job="j", command=("x",), checkpoint_dir=str(tmp_path / "file"))
    with pytest.raises(UsageError, match="--checkpoint-dir"):
        refuse_or_take(config)
    give_back(config)
    nowhere = JobConfig(job="j", command=("x",), checkpoint_dir="nonsense://x")
    with pytest.raises(UsageError, match="nonsense"):
        refuse_or_take(nowhere)


@pytest.mark.parametrize("place", ["file", "file/checkpoints", "file://{}/file"])
def test_a_file_where_a_folder_is_wanted_is_called_one(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    place = place.format(tmp_path) if "://" in place else str(tmp_path / place)
    config = JobConfig(job="j", command=("x",), checkpoint_dir=place)
    with pytest.raises(UsageError, match=rf"{tmp_path}/file is a file; give a folder"):
        refuse_or_take(config)
