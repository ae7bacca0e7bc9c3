"""Job: what drills are done to, the bundled training job or a script of the user's."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ftkit.core.fault_plan import PlannedFault, to_environ
from ftkit.core.trace import read_run
from ftkit.launch import clean_drill, detector_drills, pace_drills, resource_drills
from ftkit.launch.config import JobConfig, new_job_id
from ftkit.launch.drill_catalogue import NODE_FAULTS, SHORT_HANDED_S, WORKLOAD
from ftkit.launch.drill_faults import LOSE_NODE
from ftkit.launch.engine import Engine
from ftkit.launch.job import Interrupted, python_command, run_job
from ftkit.recovery.plan import Stop


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What drills are done to: the bundled training job, or a script of the user's."""

    nproc: int = 3
    """Ranks on each node, as for `ftkit run`."""
    nodes: int = 1
    steps: int = 150
    slots: int = 6
    slot_size: int = 2
    data: Path | None = None
    script: str | None = None
    engine: str = "embedded"
    max_stall_s: float = 30.0
    parity: str = ""
    """k+m, as for `ftkit run`."""
    sharded: int = 0
    """Ranks over which the bundled job cuts a copy of its model: 0 for none, 1 for all."""
    zero: bool = False
    """Whether the bundled job cuts its optimizer's state over the ranks."""
    stages: bool = False
    """Whether the bundled job is a pipeline."""
    spares: int = 0
    """Ranks more on each node, kept warm."""
    workload: tuple[str, ...] = ()
    """Further arguments of the bundled job."""

    def for_nodes(self, fault: str) -> "Job":
        """The job as a fault of nodes needs it: on one node given, each rank gets its own."""
        job = self
        if job.nodes == 1:
            job = replace(job, nodes=max(job.nproc, NODE_FAULTS[fault]), nproc=1)
        m = 1 if fault == LOSE_NODE else 2
        return job if job.parity else replace(job, parity=f"{job.nodes - m}+{m}")

    def for_members(self) -> "Job":
        """The job as faults over time need it: slow while a seat is empty, so that it lasts."""
        if self.script is not None:
            return self
        return replace(self, workload=(*self.workload, "--short-handed-s", str(SHORT_HANDED_S)))

    def for_stages(self) -> "Job":
        """The job as a pipeline, slow while a seat is empty."""
        return replace(self.for_members(), stages=True, slots=max(self.slots, self.world_size))

    def for_pace(self, fault: str) -> "Job":
        """The job as drills of pace need it: its work does not depend on free cores."""
        if self.script is not None:
            return self
        longer = {
            resource_drills.LEAK: resource_drills.LEAK_DEVICE_S,
            detector_drills.DETECTOR_FAULTS: detector_drills.DEVICE_S,
        }
        seconds = longer.get(fault, pace_drills.DEVICE_S)
        more = clean_drill.WORKLOAD_OPTIONS if fault == clean_drill.CLEAN else ()
        return replace(self, workload=(*self.workload, "--device-s", str(seconds), *more))

    @property
    def world_size(self) -> int:
        """Ranks of the whole job."""
        return self.nproc * self.nodes

    @property
    def command(self) -> tuple[str, ...]:
        if self.script is not None:
            return python_command(self.script, self.workload)
        data = ("--data", str(self.data)) if self.data else ()
        sizes: list[tuple[str, float]] = [
            ("--steps", self.steps),
            ("--slots", self.slots),
            ("--slot-size", self.slot_size),
        ]
        if self.sharded:
            # With what depends on ranks elsewhere: random draws, and a norm over all parameters.
            sizes += [("--sharded", self.sharded), ("--dropout", 0.1), ("--clip", 1.0)]
        words = [str(word) for pair in sizes for word in pair]
        if self.zero:
            words += ["--zero", "--dropout", "0.1", "--clip", "1.0"]
        if self.stages:
            # A block for each stage at least, beside the embedding and the output.
            depth = str(max(4, self.world_size))
            words += ["--stages", "--depth", depth, "--dropout", "0.1", "--clip", "1.0"]
        return python_command("-m", (WORKLOAD, *words, *data, *self.workload))

    def run(
        self,
        run_dir: Path,
        *,
        faults: list[PlannedFault] = [],  # noqa: B006  # never changed
        on_poll: Callable[[Engine], None] | None = None,
        job_id: str | None = None,
        settings: Mapping[str, Any] = {},
    ) -> tuple[Stop, list[dict[str, Any]]]:
        """Run the job once. Returns its end and its events. Blocks.

        `settings` are further fields of its JobConfig; variables in their `env` are added.

        Raises:
          SystemExit: a signal ended it, so that there is nothing to judge; with its exit code.
        """
        config = JobConfig(
            job=job_id or new_job_id(),
            command=self.command,
            nodes=self.nodes,
            nproc=self.nproc,
            spares=self.spares,
            parity=self.parity,
            max_stall_s=self.max_stall_s,
            run_dir=str(run_dir),
            rank_logs=True,
            **{**settings, "env": {**to_environ(faults), **settings.get("env", {})}},
        )
        stop = run_job(config, engine=self.engine, on_poll=on_poll)
        if isinstance(stop, Interrupted):
            print(f"ftkit: {stop.reason}; nothing is judged", file=sys.stderr)
            sys.exit(stop.code)
        return stop, read_run(run_dir)
