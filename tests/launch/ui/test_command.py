"""`ftkit ui` as a person meets it: beside a job that runs, over a run that is over, and refused."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.launch.histories import disturbed
from tests.launch.test_cli_run import ROOT, Cli

pytestmark = pytest.mark.multiproc
LIMIT_S = 60.0


class Viewer:
    """One `ftkit ui` in `folder`."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ftkit.launch.cli", "ui", *arguments],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def address(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r"(http://\S+/)", line)
        assert found, line + (self.process.stderr.read() if self.process.stderr else "")
        return found[1]

    def end(self, number: signal.Signals = signal.SIGINT) -> tuple[int, str]:
        if self.process.poll() is None:
            self.process.send_signal(number)
        _, err = self.process.communicate(timeout=LIMIT_S)
        return self.process.returncode, err


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[Cli]:
    cli = Cli(tmp_path)
    try:
        yield cli
    finally:
        cli.end()


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "night" / "events"
    folder.mkdir(parents=True)
    (folder / "all.jsonl").write_text("".join(json.dumps(e) + "\n" for e in disturbed()))
    return tmp_path


def read(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=LIMIT_S) as answer:
        body = answer.read().decode()
    return json.loads(body) if "/view" in url else body


def test_a_running_job_is_seen_with_what_its_ranks_do(cli: Cli) -> None:
    job = cli.start("--nproc", "2", "--no-preload", "train.py", ".")
    cli.wait_for_ranks(2)
    viewer = Viewer(cli.folder, cli.job(), "--port", "0")
    try:
        url = viewer.address()
        assert url.startswith("http://127.0.0.1:")
        assert '<section id="ranks">' in read(url)
        view = read(url + "view")
        assert (view["name"], view["data"]["ended"]) == (cli.job(), False)
        assert [rank["seat"] for rank in view["data"]["ranks"]] == [0, 1]
        assert "rank 1, member 1" in view["parts"]["ranks"]
        (cli.folder / "go").touch()
        assert job.wait(LIMIT_S) == 0  # the job never waited for its viewer
        end = time.monotonic() + LIMIT_S
        while not read(url + "view")["data"]["ended"]:
            assert time.monotonic() < end
            time.sleep(0.1)
    finally:
        code, err = viewer.end()
    assert (code, err) == (0, "")


def test_a_run_that_is_over_is_shown_and_sigterm_ends_it(finished: Path) -> None:
    viewer = Viewer(finished, "--port", "0")
    try:
        view = read(viewer.address() + "view?seen=0")
        assert (view["data"]["step"], view["data"]["outcome"]) == (6, "completed")
        assert "survivors committed step 3" in view["data"]["incidents"][0]
    finally:
        code, err = viewer.end(signal.SIGTERM)
    assert (code, err) == (0, "")
    assert sorted(p.name for p in finished.rglob("*")) == ["all.jsonl", "events", "night", "runs"]


def test_what_cannot_be_served_is_refused_with_words(finished: Path) -> None:
    from click.testing import CliRunner

    from ftkit.launch.cli import main

    run = str(finished / "runs" / "night")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        cases = [
            ([run, "--port", port], 64, "is taken, perhaps by another `ftkit ui`; give --port"),
            ([run, "--host", "192.0.2.1"], 64, "192.0.2.1 is no address of this machine"),
            ([run, "--port", "70000"], 2, "70000 is not in the range"),
            ([run, "--prt", "1"], 2, "No such option '--prt'. Did you mean '--port'?"),
            (["nowhere"], 64, "nowhere is not a run's folder: it has no events/. Give"),
        ]
        for arguments, code, words in cases:
            found = CliRunner().invoke(main, ["ui", *arguments])
            assert (found.exit_code, found.stdout) == (code, "")
            assert words in " ".join(found.stderr.split())
