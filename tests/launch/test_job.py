"""A job from start to end, as the command line sees it, whatever engine runs it."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from ftkit.core.errors import UsageError
from ftkit.launch.cli import main
from ftkit.launch.config import JobConfig
from ftkit.launch.embedded import EmbeddedEngine
from ftkit.launch.job import engine_class, run_job
from ftkit.recovery.plan import Stop


class Deaf:
    """An engine that an interrupt does not end, and that is interrupted twice."""

    closed = False
    heard = 0

    def start(self) -> None:
        pass

    def interrupt(self) -> None:
        self.heard += 1

    def poll(self) -> Stop | None:
        signal.raise_signal(signal.SIGINT if not self.heard else signal.SIGTERM)
        return None

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


class Impatient(Deaf):
    """Ended by one signal, and while it is being closed the user sends more."""

    def poll(self) -> Stop | None:
        if self.heard:
            return Stop(code=130, reason="interrupted")
        signal.raise_signal(signal.SIGINT)
        return None

    def close(self) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        self.closed = True


def test_signals_while_the_job_is_being_closed_leave_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    engine = Impatient()
    monkeypatch.setattr("ftkit.launch.job.engine_class", lambda _: lambda *_: engine)
    stop = run_job(JobConfig(job="x", command=("true",), run_dir=str(tmp_path / "run")))
    assert (stop.code, stop.reason) == (130, "ended by SIGINT")
    assert engine.closed


def test_a_drill_that_is_interrupted_judges_nothing_and_begins_no_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("ftkit.launch.job.engine_class", lambda _: lambda *_: Impatient())
    done = CliRunner().invoke(
        main,
        ["drill", "run", "kill", "--count", "3", "--run-dir", str(tmp_path / "drills"), "--json"],
    )
    assert (done.exit_code, done.stdout) == (130, "")
    assert "ended by SIGINT; nothing is judged" in done.stderr
    assert [p.name for p in (tmp_path / "drills").iterdir()] == ["reference"]


def test_ctrl_c_has_its_exit_code_wherever_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ftkit.launch.cli.newest_run", interrupted)
    done = CliRunner().invoke(main, ["status"])
    assert (done.exit_code, done.stdout, done.stderr) == (130, "", "ftkit: interrupted\n")


def test_an_agent_whose_start_is_interrupted_is_ended(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ftkit.launch.embedded.select.select", interrupted)
    engine = EmbeddedEngine(
        JobConfig(job="x", command=("true",), run_dir=str(tmp_path), shm_root=str(tmp_path)), "00"
    )
    agent = subprocess.Popen(["sleep", "600"])
    monkeypatch.setattr(engine, "_spawn", lambda *_, **__: agent)
    try:
        with pytest.raises(KeyboardInterrupt):
            engine.start()
        assert agent.poll() is not None
    finally:
        agent.kill()
        agent.wait()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "kill", "--run-dir", "file"], "--run-dir file cannot be made: File exists"),
        (["run", "kill", "--run-dir", "file/x"], "--run-dir file/x cannot be made: Not a dir"),
        (["demo", "--report", "nowhere/x.html"], "--report nowhere/x.html cannot be written"),
        (["demo", "--report", "."], "--report . cannot be written"),
    ],
)
def test_where_a_drill_cannot_write_is_said_before_it_begins(
    arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    done = CliRunner().invoke(main, ["drill", *arguments])
    assert done.exit_code == 64, done.output
    assert words in done.stderr


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
