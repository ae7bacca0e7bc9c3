"""`ftkit run` as a person meets it: what it refuses, how it ends, what it leaves."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from ftkit.launch.cli import main
from tests.launch.engine_contract import WAIT, leftovers, runs

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 60.0

#: For ranks that need no torch: nothing waits until it is imported.
FROM_SCRATCH = "--no-preload"

pytestmark = pytest.mark.multiproc


class Cli:
    """Runs the command in one folder; every process it starts is gone afterwards."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environ = {n: v for n, v in os.environ.items() if not n.startswith("RAY_")}
        self.environ["PYTHONPATH"] = str(ROOT)
        self._started: list[subprocess.Popen[str]] = []

    def start(self, *arguments: str, script: str = WAIT) -> subprocess.Popen[str]:
        (self.folder / "train.py").write_text(textwrap.dedent(script))
        process = subprocess.Popen(
            [sys.executable, "-m", "ftkit.launch.cli", "run", *arguments],
            cwd=self.folder,
            env=self.environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._started.append(process)
        return process

    def run(self, *arguments: str, script: str = "") -> tuple[int, str, str]:
        """(exit code, stdout, stderr) of one command."""
        process = self.start(*arguments, script=script)
        out, err = process.communicate(timeout=LIMIT_S)
        assert "Traceback" not in err, err
        return process.returncode, out, err

    def wait_for_ranks(self, count: int) -> list[tuple[int, int]]:
        """(process, agent) of ranks that run WAIT."""
        files = [self.folder / f"up{rank}" for rank in range(count)]
        deadline = time.monotonic() + LIMIT_S
        while not all(f.exists() for f in files):
            assert self._started[-1].poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return [(int(a), int(b)) for a, b in (f.read_text().split() for f in files)]

    def job(self) -> str:
        (run,) = (self.folder / "runs").iterdir()
        return run.name

    def end(self) -> None:
        for process in self._started:
            if process.poll() is None:
                process.kill()
            process.communicate()


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[Cli]:
    cli = Cli(tmp_path)
    try:
        yield cli
    finally:
        cli.end()


# ---- what it refuses


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nowhere.py"], 64, "there is no script 'nowhere.py' in "),
        (["--nproc", "0", "train.py"], 64, "--nodes and --nproc count from 1, got 1 and 0"),
        (["--nodes", "-1", "train.py"], 64, "count from 1, got -1 and 1"),
        (["--max-stall", "0.1", "train.py"], 64, "max_stall_s is 0.1, must be at least 1.0"),
        (["--max-stall", "nan", "train.py"], 64, "--max-stall: "),
        (["--max-restarts", "-1", "train.py"], 64, "--max-restarts is -1, not a number"),
        (
            ["--spares", "5000", "train.py"],
            64,
            "5001 processes on a node, which has places for 4096",
        ),
        (["--engine", "slurm", "train.py"], 2, "'slurm' is not one of 'embedded', 'ray'"),
        (["--nproc", "two", "train.py"], 2, "'two' is not a valid integer"),
        (["--nprc", "2", "train.py"], 2, "Did you mean '--nproc'?"),
        (["-m"], 64, "-m needs the name of a module"),
        ([], 2, "Missing argument 'SCRIPT'"),
        (["--shm-root", "nowhere", "train.py"], 64, "--shm-root nowhere is no directory"),
        (["--numa", "999", "train.py"], 64, "--numa 999: this machine has memory on nodes"),
        (["--run-dir", "/proc/nowhere", "train.py"], 64, "/proc/nowhere"),
        (["--run-dir", "train.py/run", "train.py"], 64, "train.py/run"),
    ],
)
def test_what_cannot_work_is_refused_with_words(
    arguments: list[str], code: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "train.py").touch()
    done = CliRunner().invoke(main, ["run", *arguments], prog_name="ftkit")
    assert isinstance(done.exception, SystemExit), done.exc_info
    assert (done.exit_code, done.stdout) == (code, "")
    assert words in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_below_stdout_is_said(cli: Cli) -> None:
    (cli.folder / "run" / "events").mkdir(parents=True)
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "ftkit", "explain", "run"],
            cwd=cli.folder,
            env=cli.environ,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
    assert (done.returncode, done.stderr) == (
        70,
        "ftkit: what is printed cannot be written: No space left on device\n",
    )


def test_a_refusal_is_a_message_and_an_exit_code(cli: Cli) -> None:
    code, out, err = cli.run("nowhere.py")
    assert (code, out) == (64, "")
    assert err.startswith("ftkit: there is no script 'nowhere.py' in ")


# ---- how it ends


def test_the_scripts_own_exit_code_and_a_reason(cli: Cli) -> None:
    script = "import sys; sys.exit(int(sys.argv[1]))"
    code, out, err = cli.run(FROM_SCRATCH, "train.py", "7", script=script)
    assert (code, out) == (7, "")
    assert "seat 0 exited with 7" in err
    assert "(events in " in err


def test_quiet_hides_no_error(cli: Cli) -> None:
    script = "import sys; print('from the rank'); sys.exit('the rank gives up')"
    code, out, err = cli.run(FROM_SCRATCH, "--quiet", "train.py", script=script)
    assert (code, out) == (1, "from the rank\n")
    assert "the rank gives up" in err
    assert "ftkit: the process in seat 0 exited with 1" in err


def test_json_is_one_object_at_the_end(cli: Cli) -> None:
    code, out, _ = cli.run(FROM_SCRATCH, "--json", "train.py", script="print('from the rank')")
    *lines, last = out.splitlines()
    assert code == 0
    assert lines == ["from the rank"]
    assert json.loads(last) == {
        "code": 0,
        "reason": "every rank finished",
        "run_dir": str(cli.folder / "runs" / cli.job()),
    }


def test_a_module_runs_as_a_script_does(cli: Cli) -> None:
    (cli.folder / "package").mkdir()
    (cli.folder / "package" / "job.py").write_text("import sys; print(__name__, sys.argv[1:])")
    code, out, _ = cli.run(FROM_SCRATCH, "-m", "package.job", "--steps", "3")
    assert (code, out) == (0, "__main__ ['--steps', '3']\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_everything_in_order(cli: Cli, number: signal.Signals) -> None:
    process = cli.start("--nproc", "2", "train.py", str(cli.folder))
    ranks = cli.wait_for_ranks(2)
    process.send_signal(number)
    _, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 128 + number
    assert f"ended by {number.name}" in err
    assert "Traceback" not in err
    assert leftovers(cli.job(), wait_s=0.0) == []
    assert not [pid for pair in ranks for pid in pair if runs(pid)]


def test_a_signal_during_the_start_ends_everything(cli: Cli) -> None:
    process = cli.start("--nproc", "2", "train.py", str(cli.folder))
    deadline = time.monotonic() + LIMIT_S
    while not list((cli.folder).glob("runs/*/events/*")):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert leftovers(cli.job(), wait_s=0.0) == []


def test_a_killed_command_takes_everything_with_it(cli: Cli) -> None:
    process = cli.start("--nproc", "2", "train.py", str(cli.folder))
    ranks = cli.wait_for_ranks(2)
    job = cli.job()
    process.kill()
    process.wait()
    deadline = time.monotonic() + 5
    while any(runs(pid) for pair in ranks for pid in pair) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert [left for left in leftovers(job) if not left.startswith("/dev/shm")] == []
    # The next job on this machine clears it away.
    assert cli.run(FROM_SCRATCH, "--run-dir", "next", "train.py", script="pass")[0] == 0
    assert leftovers(job, wait_s=0.0) == []


# ---- what it runs


def test_a_plain_torch_script_runs_unchanged(cli: Cli) -> None:
    script = """
        import torch
        import torch.distributed as dist

        dist.init_process_group("gloo")
        value = torch.tensor([dist.get_rank() + 1.0])
        dist.all_reduce(value)
        assert value.item() == 3.0, value
        dist.barrier()
        print("reduced")
        dist.destroy_process_group()
    """
    code, out, err = cli.run("--nproc", "2", "train.py", script=script)
    assert code == 0, err
    # Unbuffered, a line and its end are two writes, and ranks write at the same time.
    assert out.count("reduced") == 2
