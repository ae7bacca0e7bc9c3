"""What every engine keeps: the tests that embedded and Ray pass alike.

Subclass `EngineContract` and say how to make an engine. Scripts import no torch, and neither do
their agents but where forked ranks are the matter, so that a job takes about a second; the jobs
are real processes all the same.
"""

import json
import os
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from ftkit.launch.config import JobConfig, new_job_id, new_secret
from ftkit.launch.engine import Engine
from ftkit.recovery.plan import Stop

#: A job here takes a second or two; a loaded machine and Ray's start-up take the rest.
LIMIT_S = 60.0

#: Says that it runs, then waits to be told to end; gives up by itself, whatever happens.
WAIT = """
    import os, sys, time
    from pathlib import Path
    here = Path(sys.argv[1])
    part = here / ("part" + os.environ["RANK"])
    part.write_text(f"{os.getpid()} {os.getppid()}")
    part.replace(here / ("up" + os.environ["RANK"]))
    end = time.monotonic() + 60
    while not (here / "go").exists() and time.monotonic() < end:
        time.sleep(0.01)
"""

#: Takes its time while both ranks are there, so that one can be told to go.
PACED = """
    import sys
    import time
    import torch
    import ftkit
    from tests.drills.training import Curve, build

    torch.set_num_threads(1)
    session = ftkit.init()
    model = build(16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    session.protect(model=model, optimizer=optimizer)
    for step in session.steps(Curve(), slots=6, slot_size=4, until=int(sys.argv[1])):
        with step:
            for x, y in step.batches():
                torch.nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
        time.sleep(0.1 if session.world_size == 2 else 0)
"""


class EngineContract:
    """The contract. `jobs` is what a test makes its jobs with."""

    def make(self, config: JobConfig, secret: str) -> Engine:
        raise NotImplementedError

    @pytest.fixture
    def jobs(self, tmp_path: Path) -> Iterator["Jobs"]:
        jobs = Jobs(self.make, tmp_path)
        try:
            yield jobs
        finally:
            for engine in jobs.engines:
                engine.close()
        for config in jobs.configs:
            assert leftovers(config.job) == []

    def test_a_script_that_ends_well_ends_the_job_with_0(self, jobs: "Jobs") -> None:
        stop = jobs.run("print('done')", nproc=2)
        assert (stop.code, stop.reason) == (0, "every rank finished")

    def test_a_failing_script_gives_its_exit_code_and_its_last_words(self, jobs: "Jobs") -> None:
        stop = jobs.run("import sys; print('no such luck', file=sys.stderr); sys.exit(3)")
        assert stop.code == 3
        assert "seat 0 exited with 3" in stop.reason
        assert "no such luck" in stop.reason

    def test_a_rank_killed_from_outside_is_named_with_its_signal(self, jobs: "Jobs") -> None:
        engine = jobs.start(WAIT, nproc=2)
        os.kill(jobs.pids(2)[1][0], signal.SIGKILL)
        stop = drive(engine)
        assert stop.code == 128 + signal.SIGKILL
        assert "seat 1 killed by SIGKILL" in stop.reason

    def test_ranks_of_two_nodes_get_torchruns_variables(
        self, jobs: "Jobs", monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # Whoever imports Ray has this from then on, and so has what he starts.
        monkeypatch.delenv("RAY_CLIENT_MODE", raising=False)
        names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK"]
        names += ["MASTER_ADDR", "MASTER_PORT"]
        script = f"""
            import json, os, sys
            from pathlib import Path
            found = {{n: os.environ[n] for n in {names}}}
            found["ray"] = [n for n in os.environ if n.startswith("RAY_")] + ["ray" in sys.modules]
            Path(sys.argv[1], "env" + os.environ["RANK"]).write_text(json.dumps(found))
        """
        assert jobs.run(script, nodes=2, nproc=2, master_port=29123, preload=True).code == 0
        for rank in range(4):
            found = json.loads((jobs.folder / f"env{rank}").read_text())
            assert found.pop("ray") == [False]
            assert list(found.values()) == [
                *(str(rank), str(rank % 2), "4", "2", str(rank // 2)),
                *("127.0.0.1", "29123"),
            ]

    def test_ranks_start_in_our_directory_with_our_environment(
        self, jobs: "Jobs", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("OURS", "as exported")
        script = "import os; assert os.environ['OURS'] == 'as exported'; open('here', 'x').close()"
        stop = jobs.run(script, preload=True)
        assert (stop.code, stop.reason) == (0, "every rank finished")
        assert (tmp_path / "here").exists()

    def test_an_interrupted_job_gives_its_ranks_time_to_end(self, jobs: "Jobs") -> None:
        script = """
            import signal, sys
            from pathlib import Path
            def end(*_):
                Path(sys.argv[1], "ended").touch()
                sys.exit(0)
            signal.signal(signal.SIGTERM, end)
        """
        engine = jobs.start(textwrap.dedent(script) + textwrap.dedent(WAIT))
        ((pid, _),) = jobs.pids(1)
        engine.interrupt()
        stop = drive(engine)
        assert stop.code == 130
        assert (jobs.folder / "ended").exists()
        assert not runs(pid)

    def test_a_job_interrupted_before_it_has_a_coordinator_ends(self, jobs: "Jobs") -> None:
        engine = jobs.engine(WAIT)
        engine.interrupt()
        engine.start()
        assert drive(engine).code == 130

    def test_a_killed_coordinator_is_replaced_by_a_higher_one(self, jobs: "Jobs") -> None:
        engine = jobs.start(WAIT, nproc=2)
        before = jobs.pids(2)
        engine.kill_coordinator()
        second = Path(jobs.configs[0].run_dir, "events", "coordinator-2.jsonl")
        deadline = time.monotonic() + LIMIT_S
        while not second.exists() or '"lead"' not in second.read_text():
            assert engine.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert jobs.pids(2) == before
        (jobs.folder / "go").touch()
        assert drive(engine) == Stop(code=0, reason="every rank finished")

    def test_the_jobs_end_is_known_even_when_no_coordinator_can_record_it(
        self, jobs: "Jobs"
    ) -> None:
        engine = jobs.start(WAIT, nodes=2)
        Path(jobs.configs[0].run_dir, "result.json.part").mkdir()
        jobs.pids(2)
        (jobs.folder / "go").touch()
        assert drive(engine) == Stop(code=0, reason="every rank finished")

    def test_a_killed_agent_takes_its_ranks_with_it_and_is_replaced(self, jobs: "Jobs") -> None:
        engine = jobs.start(WAIT, preload=True)
        ((pid, agent),) = jobs.pids(1)
        os.kill(agent, signal.SIGKILL)
        deadline = time.monotonic() + LIMIT_S
        while not (now := [p for p, a in jobs.pids(1) if a != agent]):
            assert engine.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert not runs(pid)
        assert now != [pid]
        (jobs.folder / "go").touch()
        assert drive(engine) == Stop(code=0, reason="every rank finished")

    def test_closing_in_the_middle_leaves_nothing(self, jobs: "Jobs") -> None:
        engine = jobs.start(WAIT, nproc=2, preload=True)
        pids = [pid for pid, _ in jobs.pids(2)]
        engine.close()
        assert leftovers(jobs.configs[0].job) == []
        assert not [pid for pid in pids if runs(pid)]
        engine.close()


class Jobs:
    """Makes jobs in one folder, and remembers them for their end."""

    def __init__(self, make: Callable[[JobConfig, str], Engine], folder: Path) -> None:
        self._make = make
        self.folder = folder
        self.engines: list[Engine] = []
        self.configs: list[JobConfig] = []

    def engine(self, script: str, **settings: Any) -> Engine:
        """An engine, not started, whose ranks run `script` with this folder as argument."""
        path = self.folder / "script.py"
        path.write_text(textwrap.dedent(script))
        config = JobConfig(
            job=new_job_id(),
            command=(sys.executable, "-u", str(path), str(self.folder)),
            run_dir=str(self.folder / "run"),
            rank_logs=True,
            max_stall_s=10.0,
            **{"preload": False, **settings},
        )
        Path(config.run_dir).mkdir()
        engine = self._make(config, new_secret())
        self.engines.append(engine)
        self.configs.append(config)
        return engine

    def start(self, script: str, **settings: Any) -> Engine:
        engine = self.engine(script, **settings)
        engine.start()
        return engine

    def run(self, script: str, **settings: Any) -> Stop:
        return drive(self.start(script, **settings))

    def pids(self, ranks: int) -> list[tuple[int, int]]:
        """(process, parent) of ranks that run WAIT, once all of them do."""
        files = [self.folder / f"up{rank}" for rank in range(ranks)]
        deadline = time.monotonic() + LIMIT_S
        while not all(f.exists() for f in files):
            for engine in self.engines:
                assert engine.poll() is None
            assert time.monotonic() < deadline, "the ranks did not start"
            time.sleep(0.02)
        return [(int(a), int(b)) for a, b in (f.read_text().split() for f in files)]


def drive(engine: Engine) -> Stop:
    """Poll to the job's end."""
    deadline = time.monotonic() + LIMIT_S
    while (stop := engine.poll()) is None:
        assert time.monotonic() < deadline, "the job did not end"
        time.sleep(0.02)
    return stop


def runs(pid: int) -> bool:
    """Whether this process runs; a zombie, which waits for its parent, does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def leftovers(job: str, *, wait_s: float = 5.0) -> list[str]:
    """Processes, shared memory and sockets that a job left, given a moment to be gone."""
    deadline = time.monotonic() + wait_s
    while (found := _leftovers(job)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def _leftovers(job: str) -> list[str]:
    found = [str(p) for p in Path("/dev/shm").glob(f"*{job}*")]
    found += [line for line in Path("/proc/net/unix").read_text().splitlines() if job in line]
    marks = (f"FTKIT_JOB={job}".encode(), f'"job": "{job}"'.encode())
    for proc in Path("/proc").glob("[0-9]*"):
        try:
            environ = (proc / "environ").read_bytes()
        except OSError:
            continue  # it ended, or is somebody else's
        if any(mark in environ for mark in marks) and runs(int(proc.name)):
            found.append(f"process {proc.name}")
    return found
