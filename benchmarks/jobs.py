"""Jobs: run one training job under ftkit and hand back its events; nothing is left behind."""

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from ftkit.core.fault_plan import PlannedFault, to_environ
from ftkit.core.trace import read_run
from ftkit.launch.config import JobConfig, new_job_id
from ftkit.launch.engine import Engine
from ftkit.launch.job import Interrupted, run_job

Event = dict[str, Any]

#: Where ftkit and these benchmarks are found by the processes that are started.
ROOT = Path(__file__).parents[1]


class JobFailed(RuntimeError):
    """A job that was to end well did not. The message says why, and shows a rank's words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A training job of a given size. All times are what the machine makes of it."""

    nproc: int
    steps: int
    slots: int = 12
    """Divides among 2, 3 and 4 ranks alike."""
    slot_size: int = 2
    max_stall_s: float = 30.0
    model: tuple[str, ...] = ()
    """Further arguments of the bundled job: --params, --width, ..."""

    @property
    def command(self) -> tuple[str, ...]:
        """What each rank runs."""
        sizes = {"--steps": self.steps, "--slots": self.slots, "--slot-size": self.slot_size}
        return (
            *(sys.executable, "-u", "-m", "benchmarks.training"),
            *(word for name, value in sizes.items() for word in (name, str(value))),
            *self.model,
        )

    def run(
        self,
        run_dir: Path,
        *,
        faults: Sequence[PlannedFault] = (),
        on_poll: Callable[[Engine], None] | None = None,
        interrupts: bool = False,
        settings: Mapping[str, Any] = {},
    ) -> list[Event]:
        """Run the job to its end. Blocks.

        Args:
          run_dir: a new folder for events and logs.
          faults: what ranks do to themselves.
          on_poll: called about twenty times a second meanwhile.
          interrupts: whether `on_poll` ends the job, so that its end is no failure.
          settings: further fields of its JobConfig; variables in their `env` are added.

        Raises:
          JobFailed: the job did not end well.
          SystemExit: it was ended by SIGINT or SIGTERM.
        """
        config = JobConfig(
            job=new_job_id(),
            command=self.command,
            nproc=self.nproc,
            max_stall_s=self.max_stall_s,
            run_dir=str(run_dir),
            rank_logs=True,
            **{
                **settings,
                "env": {
                    **to_environ(list(faults)),
                    "PYTHONPATH": python_path(),
                    **settings.get("env", {}),
                },
            },
        )
        # The engine's own processes are started from here too.
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = python_path()
        try:
            stop = run_job(config, on_poll=on_poll)
        finally:
            if before is None:
                del os.environ["PYTHONPATH"]
            else:
                os.environ["PYTHONPATH"] = before
        if isinstance(stop, Interrupted):
            raise SystemExit(stop.code)
        if stop.code and not interrupts:
            raise JobFailed(f"{stop.reason} (code {stop.code})\n{_last_words(run_dir)}")
        return read_run(run_dir)


def python_path() -> str:
    """PYTHONPATH with this checkout first."""
    given = os.environ.get("PYTHONPATH", "")
    return os.pathsep.join(p for p in (str(ROOT), given) if p)


@contextmanager
def scratch(name: str, where: Path | None = None) -> Iterator[Path]:
    """A folder for a benchmark's runs, removed afterwards, by SIGTERM too."""
    folder = Path(tempfile.mkdtemp(prefix=f"ftkit-{name}-", dir=where))
    try:
        with ended_by_sigterm():
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """SIGTERM raises SystemExit in the main thread, so that `finally` cleans up."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def params_of(events: Sequence[Event]) -> set[str]:
    """The digests of the final parameters that ranks told."""
    return {str(e["params"]) for e in events if e["kind"] == "final"}


def _last_words(run_dir: Path) -> str:
    logs = sorted((run_dir / "logs").glob("*"))
    return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-1500:]}" for log in logs)
