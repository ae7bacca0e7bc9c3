"""Drill programmes as a person meets them: beside a job that runs and was started as any other."""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from ftkit.core.trace import read_run
from ftkit.launch.cli import main
from tests.launch.engine_contract import leftovers
from tests.launch.test_cli_run import ROOT

pytestmark = pytest.mark.multiproc
LIMIT_S = 90.0
ENVIRON = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


class Ftkit:
    """The command, in one folder; whatever it started is gone afterwards."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[subprocess.Popen[str]] = []

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "ftkit.launch.cli", *arguments],
            cwd=self.folder,
            env=ENVIRON,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(process)
        return process

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        """(exit code, stdout, stderr) of a command, in this process: it starts no other."""
        with contextlib.chdir(self.folder):
            done = CliRunner().invoke(main, arguments, prog_name="ftkit")
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exc_info
        return done.exit_code, done.stdout, done.stderr

    @property
    def run_dir(self) -> Path:
        return self.folder / "runs" / "job"

    def drills(self) -> list[dict[str, Any]]:
        return [e for e in read_run(self.run_dir) if e["kind"] == "drill"]

    def end(self) -> None:
        for process in self.started:
            if process.poll() is None:
                process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def example() -> list[list[str]]:
    """The commands of docs/drills.md, in order: a job, a drill of it, and the certificate."""
    text = (ROOT / "docs" / "drills.md").read_text()
    section = text[text.index("## Drills of a job in production") :]
    blocks = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    lines = "".join(blocks[:2]).splitlines()  # those after it strike for hours
    commands = [shlex.split(line) for line in lines]
    assert [c[:3] for c in commands] == [
        ["ftkit", "run", "--nproc"],
        ["ftkit", "drill", "plan"],
        ["ftkit", "drill", "certificate"],
    ]
    return [c[1:] for c in commands]


@pytest.fixture(scope="module")
def ftkit(tmp_path_factory: pytest.TempPathFactory, example: list[list[str]]) -> Iterator[Ftkit]:
    """The job of the example, which trains; it takes no restarts, as drills are none."""
    ftkit = Ftkit(tmp_path_factory.mktemp("programme"))
    try:
        command, *words = example[0]
        ftkit.start(command, "--max-restarts", "0", *words)
        deadline = time.monotonic() + LIMIT_S
        while not (ftkit.run_dir / "drill-access.json").exists():
            assert ftkit.started[0].poll() is None, ftkit.started[0].communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield ftkit
    finally:
        ftkit.end()


def test_the_example_of_the_docs_runs(ftkit: Ftkit, example: list[list[str]]) -> None:
    # The job may replace nobody, and survives: what is drilled is not among its failures.
    code, out, err = ftkit(*example[1])
    assert code == 0, out + err
    (line,) = (ftkit.folder / "runs" / "drills.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert (record["outcome"], record["reason"]) == ("survived", "")
    assert (record["world"], record["nodes"], record["engine"]) == (3, 1, "embedded")
    assert 0 < record["detect_s"] <= record["next_step_s"] <= record["whole_s"]
    assert record["lost_s"] <= record["whole_s"]
    for name in ("steps_lost", "steps_replayed", "slots_lost", "slots_doubled", "others_lost"):
        assert record[name] == 0
    (event,) = ftkit.drills()
    assert (event["seat"], event["live"]) == (record["seats"][0], True)
    assert record["at"] == pytest.approx(event["t"], abs=0.01)
    code, out, err = ftkit(*example[2])
    assert code == 0, err
    assert re.search(r"^kill +1 +1 +20\.7 to 100\.0 %", out, re.MULTILINE), out
    assert "What was survived" in (ftkit.folder / "certificate.html").read_text()


def test_a_guard_forbids_and_says_why(ftkit: Ftkit) -> None:
    before = ftkit.drills()
    words = ("--once", "--patience", "1s", "--steps-between", "1000000", "--history", "h")
    code, out, err = ftkit("drill", "plan", "runs/job", "--json", *words)
    record = json.loads(out)
    assert (code, record["outcome"]) == (2, "skipped")
    assert "1000000 are wanted" in record["reason"]
    assert "not yet:" in err
    assert ftkit.drills() == before


def test_a_drill_that_is_not_over_in_time_has_failed_and_what_it_stopped_is_woken(
    ftkit: Ftkit,
) -> None:
    words = ("--fault", "stop", "--once", "--steps-between", "10", "--give-up", "1s")
    code, out, _ = ftkit("drill", "plan", "runs/job", "--json", "--history", "h2", *words)
    record = json.loads(out)
    assert (code, record["outcome"], record["whole_s"]) == (1, "failed", None)
    assert "not whole again after" in record["reason"]
    # It goes on in its place, long before anybody would have been evicted.
    event, deadline = ftkit.drills()[-1], time.monotonic() + 20
    while not any(
        e["kind"] == "commit" and e["member"] == event["member"] and e["step"] > event["step"] + 1
        for e in read_run(ftkit.run_dir)
    ):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    gone = [e for e in read_run(ftkit.run_dir) if e["kind"] == "exit" and e["mono"] > event["mono"]]
    assert gone == []
    code, out, _ = ftkit("drill", "certificate", "h2", "runs/drills.jsonl", "--json")
    assert (code, [d["survived"] for d in json.loads(out)["drills"]]) == (1, [1, 0])


def test_the_stop_switch_holds_and_the_job_goes_on_without_a_programme(ftkit: Ftkit) -> None:
    before = ftkit.drills()

    def waiting() -> subprocess.Popen[str]:
        process = ftkit.start("drill", "plan", "runs/job", "--every", "1000d")
        assert process.stdout is not None
        assert "is due" in process.stdout.readline()
        return process

    stopped, interrupted = waiting(), waiting()
    interrupted.send_signal(signal.SIGINT)
    _, err = interrupted.communicate(timeout=LIMIT_S)
    assert (interrupted.returncode, "the job goes on" in err) == (130, True)
    assert stopped.poll() is None
    assert ftkit("drill", "stop", "runs/job")[0] == 0
    out, _ = stopped.communicate(timeout=LIMIT_S)
    assert (stopped.returncode, "drills are stopped" in out) == (0, True)
    code, _, err = ftkit("drill", "plan", "runs/job", "--once")
    assert (code, "ftkit drill stop --clear" in err) == (64, True)
    assert ftkit("drill", "stop", "runs/job", "--clear")[0] == 0
    assert ftkit.drills() == before

    # Once the job is over, nobody is let in any more.
    job = ftkit.started[0]
    assert job.poll() is None
    job.send_signal(signal.SIGINT)
    _, err = job.communicate(timeout=LIMIT_S)
    assert job.returncode == 130, err
    code, _, err = ftkit("drill", "plan", "runs/job", "--once")
    assert (code, "its job is over" in err) == (64, True)
    record = json.loads((ftkit.folder / "runs" / "drills.jsonl").read_text())
    assert not leftovers(record["job"])
