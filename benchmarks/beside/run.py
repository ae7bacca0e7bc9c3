"""One run of one tool: start it, wait for its end or for a standstill, and leave nothing behind."""

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor

from benchmarks.beside.environments import last_words
from benchmarks.beside.steplog import Event
from benchmarks.beside.task import Task
from benchmarks.beside.tools import Command, Site, Tool, environment_of
from benchmarks.jobs import scratch
from ftkit.core.trace import read_events

_PR_SET_CHILD_SUBREAPER = 36

#: Between two looks at the processes, in seconds; and between two readings of their memory.
LOOK_S, MEMORY_S = 0.05, 1.0

#: For processes to be gone after SIGKILL.
GRACE_S = 20.0

#: Variables of the caller that would have a tool join something that runs already.
FOREIGN = ("RAY_ADDRESS", "TORCHFT_LIGHTHOUSE", "MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """What is left of a run."""

    logs: Mapping[int, Sequence[Event]]
    finals: Sequence[Tensor]
    """The parameters, one flat vector of each rank that finished."""
    standstill: bool
    """It was ended because no step was finished for too long."""
    job_mib: float | None
    """The most memory that all its processes had together, shared pages counted once."""
    said: str
    """What the last process that failed died of; empty if none said anything."""


def play(tool: Tool, task: Task, python: Path, *, limit_s: float) -> Played:
    """Run `task` through `tool`. Blocks.

    Args:
      tool: what to start.
      task: its folder exists and is empty.
      python: the interpreter of the tool's environment.
      limit_s: seconds without a finished step after which the run is ended.
    """
    folder = Path(task.folder)
    (folder / "tmp").mkdir()
    with scratch("bench", Path("/dev/shm")) as shm, nothing_left():
        commands = tool.commands(Site(task=task, python=python, shm=shm))
        env = {name: value for name, value in os.environ.items() if name not in FOREIGN}
        env |= environment_of(tool, task) | {"TMPDIR": str(folder / "tmp")}
        started = [
            _start(command, env, folder / f"process-{number}")
            for number, command in enumerate(commands)
        ]
        awaited = [p for c, p in zip(commands, started, strict=True) if not c.server]
        standstill, job_mib = _watch(awaited, folder, limit_s, weigh=not task.fault)
        # What was struck says nothing of why the others did not go on.
        failed = [
            number
            for number, process in enumerate(started)
            if process.poll() not in (0, -signal.SIGKILL)
            and not (commands[number].server or _is_stopped(process.pid))
        ]
    for process in started:
        process.wait()  # gone already: for its own book-keeping
    errors = [(folder / f"process-{n}.err").read_text(errors="replace") for n in failed]
    return Played(
        logs={
            int(path.stem): list(read_events(path))
            for path in sorted((folder / "steps").glob("*.jsonl"))
        },
        finals=[torch.load(path) for path in sorted((folder / "finals").glob("*.pt"))],
        standstill=standstill,
        job_mib=job_mib,
        said=last_words("\n".join(errors)) if errors else "",
    )


def _start(command: Command, env: Mapping[str, str], out: Path) -> subprocess.Popen[bytes]:
    with out.with_suffix(".out").open("wb") as stdout, out.with_suffix(".err").open("wb") as stderr:
        return subprocess.Popen(
            command.argv,
            env={**env, **command.env},
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            cwd=out.parent,
            start_new_session=True,
        )


def _watch(
    awaited: Sequence[subprocess.Popen[bytes]], folder: Path, limit_s: float, *, weigh: bool
) -> tuple[bool, float | None]:
    """Wait until all have ended or stand still; the most memory meanwhile, if it is weighed."""
    written, since = -1, time.monotonic()
    heaviest, weighed = list[float](), 0.0
    while not all(p.poll() is not None or _is_stopped(p.pid) for p in awaited):
        now = time.monotonic()
        size = sum(path.stat().st_size for path in (folder / "steps").glob("*.jsonl"))
        if size != written:
            written, since = size, now
        if now - since > limit_s:
            return True, None
        if weigh and size and now - weighed > MEMORY_S:
            weighed = now
            heaviest.append(sum(map(_pss_mib, psutil.Process().children(recursive=True))))
        time.sleep(LOOK_S)
    return False, max(heaviest, default=None)


def _is_stopped(pid: int) -> bool:
    """Whether a process lies stopped by a signal, and so will not end by itself."""
    with contextlib.suppress(psutil.Error):
        return bool(psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    return False


def _pss_mib(process: psutil.Process) -> float:
    with contextlib.suppress(psutil.Error):
        return float(process.memory_full_info().pss / 2**20)
    return 0.0


@contextlib.contextmanager
def nothing_left() -> Iterator[None]:
    """End every process that the block started, and those that they did, daemons too.

    Whoever detaches itself becomes this process's child rather than init's, and is found so.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    before = set(psutil.Process().children(recursive=True))
    try:
        yield
    finally:
        deadline = time.monotonic() + GRACE_S
        while left := [p for p in psutil.Process().children(recursive=True) if p not in before]:
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(left, timeout=1.0)
            if time.monotonic() > deadline:
                names = ", ".join(f"{p.pid} {p.status()}" for p in left if p.is_running())
                raise TimeoutError(f"processes outlive SIGKILL by {GRACE_S:.0f} s: {names}")
