"""A job from start to end, as the command line sees it, whatever engine runs it."""

import signal
from pathlib import Path

import pytest

from ftkit.launch.config import JobConfig
from ftkit.launch.job import run_job


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
    monkeypatch.setattr("ftkit.launch.job.make_engine", lambda *_: engine)
    stop = run_job(JobConfig(job="x", command=("true",), run_dir=str(tmp_path / "run")))
    assert (stop.code, stop.reason) == (130, "ended at once by SIGINT and SIGTERM")
    assert engine.closed
    assert engine.heard == 1
