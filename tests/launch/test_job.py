"""A job from start to end, as the command line sees it, whatever engine runs it."""

import signal
import sys
from pathlib import Path

import pytest

from ftkit.core.errors import UsageError
from ftkit.launch.config import JobConfig
from ftkit.launch.job import engine_class, run_job


class Deaf:
    """An engine that an interrupt does not end, and that is interrupted twice."""

    closed = False
    heard = 0

    def start(self) -> None:
        pass

    def interrupt(self) -> None:
        self.heard += 1

    def poll(self) -> None:
        signal.raise_signal(signal.SIGINT if not self.heard else signal.SIGTERM)

    def close(self) -> None:
        self.closed = True


def test_a_second_signal_ends_at_once_with_the_code_of_the_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    engine = Deaf()
    monkeypatch.setattr("ftkit.launch.job.engine_class", lambda _: lambda *_: engine)
    stop = run_job(JobConfig(job="x", command=("true",), run_dir=str(tmp_path / "run")))
    assert (stop.code, stop.reason) == (130, "ended at once by SIGINT and SIGTERM")
    assert engine.closed
    assert engine.heard == 1


def test_without_ray_its_engine_says_what_to_install_and_makes_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # cannot be imported, as if not installed
    monkeypatch.delitem(sys.modules, "ftkit.launch.ray_engine", raising=False)
    config = JobConfig(job="x", command=("true",), run_dir=str(tmp_path / "run"))
    with pytest.raises(UsageError, match=r"pip install 'ftkit\[ray\]'.*--engine embedded"):
        run_job(config, engine="ray")
    assert list(tmp_path.iterdir()) == []
    engine_class("embedded")  # needs none


def test_another_module_that_ray_s_engine_lacks_is_not_called_ray(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "psutil", None)
    monkeypatch.delitem(sys.modules, "ftkit.launch.ray_engine", raising=False)
    with pytest.raises(ModuleNotFoundError, match="psutil"):
        engine_class("ray")


def test_an_engine_that_there_is_not_is_refused() -> None:
    with pytest.raises(UsageError, match="use embedded or ray"):
        engine_class("slurm")
