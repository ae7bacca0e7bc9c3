"""JobConfig: one description of a job, and every time derived from one number.

`max_stall_s` is how long a rank may keep the others waiting before it is replaced. All other
times follow from it (`Times`), so there is no set of timeouts to keep in order by hand. The
process environment is read here, and by `core.rank_env` inside a rank.
"""

import json
import math
import os
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ftkit.checkpoint.numa import check_setting
from ftkit.checkpoint.stripes import Code
from ftkit.core.errors import ProtocolError, UsageError
from ftkit.detection.config import DetectionConfig
from ftkit.detection.status import SEATS_MAX
from ftkit.launch.ray_placement import AUTO_PLACEMENT, STRATEGIES, parse_resources
from ftkit.recovery.budget import BudgetConfig
from ftkit.recovery.waiting import OnLoss

#: How long the last checkpoint of a job that is told to end may take. Who sends it SIGTERM is
#: used to give it 30 s.
PREEMPTED_S = 15.0


#: As `checkpoint_every`.
AUTO = "auto"

#: An agent reports so many times before its node is taken for lost.
REPORTS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Everything that waits, in seconds, derived from `max_stall_s`.

    The chain, in order::

    heartbeat <= tick <= report <= halt <= stall <= node, and exit grace apart.

    Others are asked about a node that was silent for half of `node_s`, and it is taken for lost
    after all of it: an agent reports three times in that, so that one late report is nothing.
    """

    heartbeat_s: float
    """Between two stamps of a rank's heartbeat thread."""
    tick_s: float
    """Between two looks of the coordinator, and of an agent at what is to be done."""
    report_s: float
    """Between two reports of an agent; in a job of very many nodes it is longer than a tick."""
    halt_s: float
    """A member that was told to stand still and says nothing for this long is replaced."""
    stall_s: float
    """`max_stall_s` itself."""
    node_s: float
    """A node whose agent cannot be reached for this long is lost."""
    grace_s: float
    """From SIGTERM to SIGKILL when the job ends."""

    @classmethod
    def derive(cls, max_stall_s: float, nodes: int = 1) -> "Times":
        """The times that belong to `max_stall_s`, with so many agents.

        Raises:
          UsageError: it is too short for the machine, or for so many nodes.
        """
        try:
            detection = DetectionConfig(max_stall_s=max_stall_s, nodes=nodes)
        except ValueError as error:
            raise UsageError(f"--max-stall: {error}") from error
        times = cls(
            heartbeat_s=detection.heartbeat_interval_s,
            tick_s=detection.tick_s,
            report_s=detection.report_s,
            halt_s=max_stall_s,
            stall_s=max_stall_s,
            node_s=2 * max_stall_s,
            grace_s=5.0,
        )
        if REPORTS * times.report_s > times.node_s:
            raise UsageError(
                f"--max-stall is {max_stall_s:g}, too short for {nodes} nodes: each reports every "
                f"{times.report_s:.1f} s, so give {math.ceil(REPORTS * times.report_s / 2)} or more"
            )
        return times


@dataclass(frozen=True, slots=True, kw_only=True)
class JobConfig:
    """One job. JSON-safe, so that agents and coordinators of any engine can be handed it."""

    job: str
    command: tuple[str, ...]
    """What each rank runs: program and arguments."""
    nodes: int = 1
    nproc: int = 1
    """Ranks on each node."""
    spares: int = 0
    """Further ranks on each node, kept warm: built and connected, and in no world until one is lost."""
    spare_nodes: int = 0
    """Further nodes, with an agent and no ranks until another node is to be left."""
    parity: str = ""
    """k+m: any m nodes of a group of k + m may vanish together; empty for none."""
    parity_every: float | str = 0
    """Seconds from the begin of a round of parity to the next one's, at least; 0: each follows the one
    before; "auto": as often as pays, by what rounds are seen to cost and how often ranks fail."""
    max_slowdown: float | None = None
    """Parity and checkpoints travel while training does not, and beyond that take at most this part
    of the time; None: as fast as they can."""
    link_cap: float | None = None
    """With `max_slowdown`: bytes a second that a node's parity and checkpoints travel at, at most."""
    memory_cap: float | None = None
    """With `max_slowdown`: bytes a second that they read from and write to memory, at most."""
    numa: str = "auto"
    """The memory node of each rank's arena: "auto" (that of its GPU, or of its processors), "off" (where
    it is touched first) or the number of one."""
    max_stall_s: float = 30.0
    alarms_per_day: float = 1.0
    """False alarms about slow ranks and the like that the whole job may cost, at any size."""
    run_dir: str = ""
    cwd: str = ""
    """Where ranks start; empty for the directory of whoever starts them."""
    shm_root: str = "/dev/shm"
    """Where each node makes its folder of shared memory."""
    rank_logs: bool = False
    """Write each rank's output to a file in run_dir/logs instead of passing it through."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Variables added to every rank's environment."""
    preload: bool = True
    """Import torch once a node, and fork ranks from there, where the command is a Python script."""
    record: bool = True
    """Record the collectives of scripts that know nothing of ftkit, where ranks are forked."""
    same_place_max: int = 3
    restarts_max: int = 100
    master_port: int = 0
    quiet: bool = False
    """Agents and coordinators write errors only, no warnings."""
    checkpoint_dir: str = ""
    """Where checkpoints go and come from: a path, or any URL that fsspec knows; empty: nowhere."""
    checkpoint_every: int | str = 0
    """Steps between two checkpoints; 0 for the one at the end alone; "auto": as often as pays, by what
    saves are seen to cost and how often ranks fail (`recovery.saving`)."""
    checkpoint_keep: str = "last:3"
    """What to keep of them (`persist.keep.policies`)."""
    checkpoint_fresh: bool = False
    """Begin at step 0 whatever is there."""
    metrics_port: int = 0
    """Where each agent serves its metrics, at the job's address; 0: nowhere. Of several nodes on one
    machine each takes the next one."""
    history: str = ""
    """Where what becomes of nodes and jobs is remembered: a file or a URL; empty: nowhere."""
    preflight: str = ""
    """What happens when a check of a node fails before ranks start: "stop" or "warn"; empty: nothing
    is checked."""
    drills: bool = True
    """Whether who runs the job may drill it while it trains (`ftkit drill plan`)."""
    on_loss: str = "auto"
    """What is done about a loss where several ways lead on: "auto" (what loses least, once that was
    measured), "smaller" or "wait" (`recovery.waiting`)."""
    resources: str = ""
    """(Ray) What each node books: NAME=AMOUNT, with commas; empty: GPUs for its ranks if there are."""
    placement: str = AUTO_PLACEMENT
    """(Ray) How nodes are put on machines: "auto", "spread", "strict-spread" or "pack"."""
    placement_s: float = 300.0
    """(Ray) How long the cluster may take to make room, by starting machines if it does."""
    checkpoint_ignore: tuple[str, ...] = ()
    """Checkpoints of before a fresh start, by their identity."""

    def __post_init__(self) -> None:
        if self.nodes < 1 or self.nproc < 1:
            raise UsageError(f"--nodes and --nproc count from 1, got {self.nodes} and {self.nproc}")
        if self.spares < 0:
            raise UsageError(f"--spares is {self.spares}, not a number of ranks")
        if self.places > SEATS_MAX:
            raise UsageError(
                f"--nproc {self.nproc} and --spares {self.spares} are {self.places} processes on a "
                f"node, which has places for {SEATS_MAX}"
            )
        if self.restarts_max < 0:
            raise UsageError(f"--max-restarts is {self.restarts_max}, not a number of processes")
        if self.spare_nodes < 0:
            raise UsageError(f"--spare-nodes is {self.spare_nodes}, not a number of nodes")
        _ = self.times  # refused here, and not by an agent that cannot start
        if self.preflight not in ("", "stop", "warn"):
            raise UsageError(f"--preflight is stop or warn, not {self.preflight!r}")
        if not self.command:
            raise UsageError("there is no command to run")
        if not 0 <= self.metrics_port <= 65535 - self.agents:
            raise UsageError(f"--metrics-port is {self.metrics_port}, not a port to listen on")
        if not (math.isfinite(self.alarms_per_day) and self.alarms_per_day > 0):
            raise UsageError(
                f"--alarms-per-day is {self.alarms_per_day}, must be above 0: without any there can "
                "be no detection"
            )
        if self.max_slowdown is not None and not 0 <= self.max_slowdown < 1:
            raise UsageError(f"--max-slowdown is {self.max_slowdown}, not a part of 1")
        check_setting(self.numa)
        for option, cap in (("--link-cap", self.link_cap), ("--memory-cap", self.memory_cap)):
            if cap is None:
                continue
            if not (math.isfinite(cap) and cap > 0):
                raise UsageError(f"{option} is {cap / 1e6:g} MB/s, must be above 0")
            if self.max_slowdown is None:
                raise UsageError(f"{option} goes with --max-slowdown: without it nothing is paced")
        if not self.checkpoint_auto and not (
            isinstance(self.checkpoint_every, int) and self.checkpoint_every >= 0
        ):
            raise UsageError(
                f"--checkpoint-every is {self.checkpoint_every}, neither a number of steps nor auto"
            )
        if self.checkpoint_every and not self.checkpoint_dir:
            raise UsageError("--checkpoint-every needs a --checkpoint-dir to write to")
        parse_resources(self.resources)
        if self.placement not in (AUTO_PLACEMENT, *STRATEGIES):
            known = ", ".join((AUTO_PLACEMENT, *STRATEGIES))
            raise UsageError(f"--placement is {self.placement!r}, none of {known}")
        if not self.placement_s > 0:
            raise UsageError(f"--placement-timeout is {self.placement_s:g}, must be above 0")
        if self.parity_every != AUTO and not (
            isinstance(self.parity_every, int | float) and 0 <= self.parity_every < math.inf
        ):
            raise UsageError(f"--parity-every is {self.parity_every}, neither seconds nor auto")
        if self.parity_every and not self.parity:
            raise UsageError("--parity-every needs --parity, which says what is made")
        if self.checkpoint_fresh and not self.checkpoint_dir:
            raise UsageError(
                "--fresh goes with --checkpoint-dir: without one every job begins at step 0"
            )
        if self.on_loss not in list(OnLoss):
            raise UsageError(f"--on-loss is {self.on_loss!r}, none of {', '.join(OnLoss)}")
        if self.code is not None:
            self.code.check_nodes(self.nodes)

    @property
    def checkpoint_auto(self) -> bool:
        """Whether the job decides by itself how often it saves."""
        return self.checkpoint_every == AUTO

    @property
    def code(self) -> Code | None:
        """What `parity` says; None when no parity is kept."""
        return Code.parse(self.parity)

    @property
    def seats(self) -> int:
        """Ranks of a full world."""
        return self.nodes * self.nproc

    @property
    def places(self) -> int:
        """Processes on each node, spare ones too: seats are numbered by them."""
        return self.nproc + self.spares

    @property
    def agents(self) -> int:
        """Nodes with an agent: those with ranks, and spare ones."""
        return self.nodes + self.spare_nodes

    @property
    def times(self) -> Times:
        return Times.derive(self.max_stall_s, self.agents)

    @property
    def detection(self) -> DetectionConfig:
        """What the judge of this job goes by, and how often agents report."""
        return DetectionConfig(max_stall_s=self.max_stall_s, nodes=self.agents)

    @property
    def budget(self) -> BudgetConfig:
        return BudgetConfig(same_place_max=self.same_place_max, restarts_max=self.restarts_max)

    @property
    def interrupt_s(self) -> float:
        """How long a job that is told to end may take over it."""
        return 2 * self.times.grace_s + (PREEMPTED_S if self.checkpoint_dir else 0.0)

    def shm_dir(self, node: int) -> Path:
        """The folder of shared memory of one node."""
        return Path(self.shm_root) / f"ftkit-{self.job}-n{node}"

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "JobConfig":
        """Read what `to_json` wrote. Raises ProtocolError on anything else."""
        try:
            value: dict[str, Any] = json.loads(text)
            lists = {name: tuple(value[name]) for name in ("command", "checkpoint_ignore")}
            return cls(**{**value, **lists})
        except (ValueError, KeyError, TypeError) as error:
            raise ProtocolError(f"not a job's configuration: {error}") from error


def new_job_id() -> str:
    """A name for a job: short, unique on a machine, fit for file names."""
    return secrets.token_hex(4)


def new_secret() -> str:
    """A job's secret, in hexadecimal."""
    return secrets.token_hex(32)


def default_engine(environ: Mapping[str, str] = os.environ) -> str:
    """Ray where there is a Ray to use, else processes on this machine."""
    if environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"):
        return "ray"  # inside `ray job submit`
    # A URL is the address of Ray's job server or client proxy: not a cluster to join from here.
    address = environ.get("RAY_ADDRESS", "")
    return "ray" if address and "://" not in address and address != "local" else "embedded"
