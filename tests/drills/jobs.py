"""Running a job of the drills and judging it; afterwards nothing of it may be left."""

import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from ftkit.core.fault_plan import Kind, PlannedFault, Point, to_environ
from ftkit.core.trace import read_run
from ftkit.launch.checker import Expectation, Outcome, check
from ftkit.launch.config import JobConfig, new_job_id
from ftkit.launch.engine import Engine
from ftkit.launch.job import python_command, run_job
from ftkit.recovery.plan import Stop
from tests.drills.training import SLOT_SIZE, SLOTS

HERE = Path(__file__).parent
TRAINING = HERE / "training.py"
STEPS = 160

Events = list[dict[str, Any]]


@dataclass(frozen=True)
class Run:
    """A job that has ended."""

    stop: Stop
    events: Events
    folder: Path

    def of(self, kind: str) -> Events:
        return [e for e in self.events if e["kind"] == kind]

    @property
    def log(self) -> str:
        """What all ranks wrote."""
        return "\n".join(p.read_text() for p in sorted(self.folder.glob("logs/*.log")))

    @property
    def params(self) -> set[str]:
        return {e["params"] for e in self.of("final")}


def run(
    folder: Path,
    script: Path,
    arguments: Sequence[str] = (),
    *,
    nproc: int = 2,
    nodes: int = 1,
    settings: Mapping[str, Any] = {},
    faults: Sequence[PlannedFault] = (),
    max_stall_s: float = 30.0,
    shm_root: Path | None = None,
    on_poll: Callable[[Engine], None] | None = None,
    engine: str = "embedded",
) -> Run:
    """Run a job, and check that no process and no shared memory is left of it.

    `settings` are further fields of its JobConfig.
    """
    # A folder of our own: what other jobs on this machine leave or remove is theirs.
    root = shm_root or Path("/dev/shm") / f"test-{uuid.uuid4().hex[:8]}"
    root.mkdir(exist_ok=True)
    config = JobConfig(
        job=new_job_id(),
        command=python_command(str(script), tuple(arguments)),
        nproc=nproc,
        nodes=nodes,
        max_stall_s=max_stall_s,
        run_dir=str(folder),
        shm_root=str(root),
        rank_logs=True,
        **{
            **settings,
            "env": {
                **to_environ(list(faults)),
                "PYTHONPATH": str(HERE.parents[1]),
                **settings.get("env", {}),
            },
        },
    )
    try:
        stop = run_job(config, engine=engine, on_poll=on_poll)
        left = [p.name for p in root.iterdir()]
    finally:
        if shm_root is None:
            shutil.rmtree(root)
    events = read_run(folder)
    pids = [e["pid"] for e in events if e["kind"] == "spawn"]
    assert not left, f"left in shared memory: {left}"
    assert not [p for p in pids if alive(p)], "a rank outlived its job"
    return Run(stop, events, folder)


def alive(pid: int) -> bool:
    """Whether process `pid` runs (or stands still), rather than having ended."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def fault(
    kind: Kind, point: Point, seat: int, step: int, *, bucket: int = 0, delay_s: float = 0.0005
) -> PlannedFault:
    """A fault of the first process in `seat`."""
    return PlannedFault(
        kind=kind, point=point, seat=seat, member=seat, step=step, bucket=bucket, delay_s=delay_s
    )


def judge(done: Run, reference: Run, *, seats: int, evicts: bool = True) -> Outcome:
    """What the checker says of a run of the training job."""
    return check(
        done.events,
        reference.events,
        Expectation(
            fault="drill",
            phase="any",
            seed=0,
            world_size=seats,
            steps=STEPS,
            slots=SLOTS,
            slot_size=SLOT_SIZE,
            evicts=evicts,
        ),
    )
