"""One rank's process: its end, its words, and that nothing outlives it."""

import os
import queue
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from ftkit.core import exit_codes
from ftkit.core.ids import MemberId, NodeId, Seat
from ftkit.core.rank_env import RankEnv
from ftkit.launch.config import JobConfig
from ftkit.launch.environment import rank_environment
from ftkit.launch.ranks import TAIL_BYTES, RankProcess
from ftkit.recovery.plan import Assignment
from tests.launch.engine_contract import runs

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 30.0


class Starter:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ended: queue.SimpleQueue[MemberId] = queue.SimpleQueue()
        self.ranks: list[RankProcess] = []

    def __call__(self, script: str, *, cwd: str | None = None) -> RankProcess:
        rank = RankProcess(
            MemberId(len(self.ranks)),
            Seat(0),
            (sys.executable, "-u", "-c", textwrap.dedent(script)),
            {"PATH": os.environ["PATH"]},
            cwd=cwd,
            log=self.folder / "logs" / "seat-0.log",
            on_exit=self.ended.put,
        )
        self.ranks.append(rank)
        return rank

    def end_of(self, rank: RankProcess) -> int | None:
        assert self.ended.get(timeout=LIMIT_S) == rank.member
        return rank.exit_code


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Starter]:
    starter = Starter(tmp_path)
    yield starter
    for rank in starter.ranks:
        rank.signal(signal.SIGKILL)


@pytest.mark.multiproc
def test_one_that_exits_has_its_code_before_it_is_gone(start: Starter) -> None:
    script = "import subprocess, time; subprocess.Popen(['sleep', '60']); print('up', flush=True)"
    rank = start(f"{script}; time.sleep(60)")
    while not rank.last_words():
        time.sleep(0.01)
    os.kill(rank.pid, signal.SIGSTOP)
    rank.begins_to_exit(-signal.SIGSEGV)
    assert rank.exit_code == -signal.SIGSEGV
    assert start.end_of(rank) == -signal.SIGSEGV, "swept, and the first word is kept"
    assert rank.gone
    rank.begins_to_exit(1)
    assert rank.exit_code == -signal.SIGSEGV


@pytest.mark.multiproc
def test_an_end_comes_with_its_code_or_signal(start: Starter) -> None:
    assert start.end_of(start("raise SystemExit(5)")) == 5
    rank = start("import time; time.sleep(60)")
    assert rank.exit_code is None
    rank.signal(signal.SIGKILL)
    assert start.end_of(rank) == -signal.SIGKILL
    rank.signal(signal.SIGKILL)  # of a process that is gone: nothing happens


@pytest.mark.multiproc
def test_last_words_are_its_own_and_the_end_of_them(start: Starter) -> None:
    start.end_of(start("print('of the one before')"))
    rank = start(f"print('x' * {2 * TAIL_BYTES}); raise ValueError('the reason')")
    start.end_of(rank)
    words = rank.last_words()
    assert words.endswith("ValueError: the reason")
    assert len(words) < TAIL_BYTES + 1
    assert "the one before" not in words
    assert "of the one before" in (start.folder / "logs" / "seat-0.log").read_text()


@pytest.mark.multiproc
def test_what_it_started_goes_with_it(start: Starter) -> None:
    rank = start(
        """
        import subprocess, sys
        from pathlib import Path
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        Path("child").write_text(str(child.pid))
        """,
        cwd=str(start.folder),
    )
    assert start.end_of(rank) == 0
    child = int((start.folder / "child").read_text())
    deadline = time.monotonic() + 5
    while runs(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not runs(child)


def test_a_program_that_is_not_there_is_an_oserror(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        RankProcess(
            *(MemberId(0), Seat(0), ("/no/such/program",), {}), log=None, on_exit=lambda _: None
        )


@pytest.mark.multiproc
def test_a_process_whose_parent_is_not_the_one_it_expects_ends_at_once() -> None:
    code = "import os; from ftkit.launch.ranks import die_with; die_with(1 << 22); print('alive')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert (done.returncode, done.stdout) == (exit_codes.AGENT_GONE, b"")


# ---- the environment


def environment(
    inherited: Mapping[str, str], *, env: Mapping[str, str] | None = None
) -> dict[str, str]:
    config = JobConfig(
        job="ab12",
        command=("x",),
        nodes=2,
        nproc=3,
        run_dir="/runs/a",
        master_port=1234,
        env=env or {},
    )
    return rank_environment(
        config,
        Assignment(seat=Seat(4), node=NodeId(1), member=MemberId(9)),
        agent="/shm/agent.sock",
        secret="00ff",
        host="10.0.0.2",
        shm_dir=Path("/shm"),
        restarts=2,
        inherited=inherited,
    )


def test_torchruns_variables_say_where_the_seat_is() -> None:
    env = environment({})
    said = {n: env[n] for n in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    assert said == {"RANK": "4", "LOCAL_RANK": "1", "WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "3"}
    assert (env["GROUP_RANK"], env["GROUP_WORLD_SIZE"]) == ("1", "2")
    assert (env["MASTER_ADDR"], env["MASTER_PORT"]) == ("10.0.0.2", "1234")
    assert env["TORCHELASTIC_RESTART_COUNT"] == "2"


def test_a_rank_reads_back_what_its_agent_said() -> None:
    told = RankEnv.read(environment({}))
    assert told is not None
    assert (told.seat, told.member, told.node, told.local_seat) == (4, 9, 1, 1)
    assert (told.agent, told.host, told.secret) == ("/shm/agent.sock", "10.0.0.2", "00ff")


def test_ours_goes_over_what_is_inherited_and_the_jobs_own_over_both() -> None:
    env = environment({"RANK": "77", "KEPT": "yes", "OMP_NUM_THREADS": "8"})
    assert (env["RANK"], env["KEPT"], env["OMP_NUM_THREADS"]) == ("4", "yes", "8")
    assert environment({})["OMP_NUM_THREADS"] == "1"
    master = environment({}, env={"MASTER_ADDR": "10.0.0.1", "KEPT": "job"})
    assert (master["MASTER_ADDR"], master["KEPT"]) == ("10.0.0.1", "job")
