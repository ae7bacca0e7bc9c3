"""Drills: which faults there are, how a seed chooses among them, and one drill from start to end.

A drill is four parts: the fault (data), the schedule (pure, from the seed), the history (the
run's event stream) and the checker (pure, `checker`). The disturbed run is compared with an
undisturbed one of the same job, which is run once and used by all drills of a series.
"""

import contextlib
import os
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ftkit.checkpoint.stripes import Code
from ftkit.core.corruption_plan import PlannedCorruption
from ftkit.core.corruption_plan import to_environ as corruption_environ
from ftkit.core.errors import UsageError
from ftkit.core.fault_plan import DESYNCS, Kind, PlannedFault, Point, to_environ
from ftkit.core.pace_plan import PacePlan
from ftkit.core.trace import Trace, read_run
from ftkit.core.verdict import Fault
from ftkit.launch import (
    detector_drills,
    multi_drills,
    number_drills,
    pace_drills,
    resource_drills,
    restart_drill,
    rot_drills,
)
from ftkit.launch.checker import Expectation, Outcome, check, expectation_of
from ftkit.launch.config import JobConfig, new_job_id
from ftkit.launch.engine import Engine
from ftkit.launch.event_tail import EventTail
from ftkit.launch.faulty_store import StoreFault, StoreFaultKind
from ftkit.launch.job import python_command, run_job
from ftkit.launch.rot_drills import ALL_NODES, CHECKPOINT
from ftkit.launch.store_drills import Witness
from ftkit.recovery.plan import Stop
from ftkit.recovery.protocol import SHARDS_BACK

KILL_COORDINATOR = "kill-coordinator"

#: The bundled training job.
WORKLOAD = "ftkit.launch.workload.train"
KILL_IN_COLLECTIVE = "kill-in-collective"

#: A rank whose script calls other collectives than its peers'.
DESYNC = "desync"

#: One rank is lost while another loses time.
TWO_AT_ONCE = "two-at-once"

#: Faults of members over time, struck from outside.
FLAP, JOIN, CHURN = "flap", "join", "churn"
#: Two ranks lost soon after one another, so that the world shrinks twice before it grows back.
SHRINK_GROW = "shrink-grow"
#: A stage of a pipeline.
STAGE_LOST = "stage-lost"
#: A node that is about to be taken away, and says so.
PREEMPT = "preempt"
#: A rank of a job that keeps one warm to replace it.
SPARE = "spare"
#: Faults of the link between two ranks.
PARTITION, SLOW_LINK, SLOW_NIC, BLACKHOLE = "partition", "slow-link", "slow-nic", "blackhole"
#: All links of one rank.
PARTITION_MINORITY = "partition-minority"
LINK_FAULTS = (PARTITION, PARTITION_MINORITY, SLOW_LINK, SLOW_NIC, BLACKHOLE)

CATALOGUE: dict[str, str] = {
    Kind.KILL: "SIGKILL to one rank",
    Kind.STOP: "SIGSTOP to one rank: it is there and does nothing",
    Kind.RAISE: "an exception in one rank's code",
    Kind.HANG: "one rank's training thread sleeps for ever, its heartbeat goes on",
    Kind.EXIT: "one rank ends at once with exit code 1, and says nothing",
    Kind.SEGFAULT: "one rank reads memory that is not its own",
    Kind.ABORT: "one rank calls abort(), as a failed check in native code does",
    Kind.OOM: "one rank allocates until its address space is used up",
    Kind.PAUSE: "SIGSTOP to one rank, and SIGCONT a second later: nobody may lose its place",
    Kind.GIL_HANG: "one rank's training thread is in native code that keeps the interpreter",
    Kind.SPIN: "one rank's training thread runs round in a loop that does not end",
    Kind.DEADLOCK: "one rank's training thread waits for a lock that it holds itself",
    DESYNC: "one of the next three, as the seed picks",
    Kind.DESYNC_SKIP: "one rank leaves out a collective that the others call",
    Kind.DESYNC_SIZE: "one rank calls a collective with fewer elements than the others",
    Kind.DESYNC_OP: "one rank calls another collective than the others",
    KILL_COORDINATOR: "SIGKILL to the coordinator while the ranks train",
    KILL_IN_COLLECTIVE: "SIGKILL to one rank at a byte of what it moves for an all-reduce",
    FLAP: "SIGKILL to one rank, and to each that replaces it once that has trained a little",
    JOIN: "a rank comes in while the others train: nobody may be held up or taken back",
    CHURN: "SIGKILL to random ranks at random moments, for as long as there are steps left",
    SHRINK_GROW: "SIGKILL to one rank and, some steps later, to another: the world shrinks, shrinks, grows",
    STAGE_LOST: "SIGKILL to one stage of a pipeline: the others take its layers until it is back",
    PREEMPT: "SIGTERM to one node's agent: its ranks must leave without a step played again",
    SPARE: "SIGKILL to one rank of a job with a spare one: it must be in within two steps",
    PARTITION: "the link between two ranks breaks and cannot be made anew for some seconds",
    PARTITION_MINORITY: "one rank is cut off from all others for some seconds: they go on without it",
    SLOW_LINK: "the link between two ranks carries a fraction of its bytes for some seconds",
    SLOW_NIC: "all that one rank sends, or receives, or both, is slow for some seconds",
    BLACKHOLE: "the link between two ranks stays open and carries nothing until it is named",
    **pace_drills.CATALOGUE,
    StoreFaultKind.KILL: "SIGKILL to an agent at a byte of a checkpoint that it writes",
    StoreFaultKind.FULL: "the disk is full from a byte of a checkpoint on",
    StoreFaultKind.SLOW: "one node's disk is slow from a byte of a checkpoint on",
    **multi_drills.CATALOGUE,
    **rot_drills.CATALOGUE,
    **restart_drill.CATALOGUE,
    **number_drills.CATALOGUE,
    **resource_drills.CATALOGUE,
    **detector_drills.CATALOGUE,
    TWO_AT_ONCE: "SIGKILL to one rank, and another becomes slow in the same steps",
}

#: How many ranks the smallest job has that such a fault can be done to.
RANKS_MIN: dict[str, int] = {
    FLAP: 2,
    JOIN: 2,
    CHURN: 3,
    SHRINK_GROW: 3,
    STAGE_LOST: 2,
    SPARE: 2,
    PREEMPT: 2,
    PARTITION: 3,
    PARTITION_MINORITY: 3,
    **multi_drills.RANKS_MIN,
    SLOW_LINK: 3,
    SLOW_NIC: 3,
    BLACKHOLE: 3,
    **dict.fromkeys(pace_drills.CATALOGUE, pace_drills.RANKS_MIN),
    Kind.PAUSE: 2,
    TWO_AT_ONCE: 4,
    **dict.fromkeys(DESYNCS, 3),
}

#: What "all" picks from: faults that any shape of job takes, in the order that seeds know.
ANYWHERE = [Kind.KILL, Kind.STOP, Kind.RAISE, Kind.HANG, KILL_COORDINATOR]

#: What the first verdict on the rank has to be called, where the drill is about that.
NAMES: dict[str, frozenset[str]] = {
    Kind.EXIT: frozenset({Fault.EXITED}),
    Kind.SEGFAULT: frozenset({Fault.EXITED}),
    Kind.ABORT: frozenset({Fault.EXITED}),
    Kind.OOM: frozenset({Fault.OOM}),
    Kind.GIL_HANG: frozenset({Fault.HANG_BUSY}),
    Kind.SPIN: frozenset({Fault.HANG_BUSY}),
    Kind.DEADLOCK: frozenset({Fault.HANG_BLOCKED}),
    **dict.fromkeys(DESYNCS, frozenset({Fault.DESYNC})),
}

#: Before this step the job has no tempo yet that a hang could be told by.
NAMED_FROM = 25

LOSE_NODE = "lose-node"
LOSE_NODES = "lose-nodes"
CORRUPT_SHARD = "corrupt-shard"

#: Faults of whole nodes, and how many nodes the smallest job has that survives them.
NODE_FAULTS: dict[str, int] = {LOSE_NODE: 3, LOSE_NODES: 4, CORRUPT_SHARD: 4}

NODE_CATALOGUE: dict[str, str] = {
    LOSE_NODE: "SIGKILL to one node's agent and ranks; its shared memory is gone",
    LOSE_NODES: "the same to as many nodes as parity allows, and SIGKILL to all other ranks",
    CORRUPT_SHARD: "bits flipped in one snapshot and one parity shard; then a node and all ranks",
}

#: Faults after which every process may still be there.
_NOBODY_LOST = (
    *(KILL_COORDINATOR, PREEMPT, StoreFaultKind.FULL, StoreFaultKind.SLOW, *LINK_FAULTS),
    *pace_drills.CATALOGUE,
    *(Kind.PAUSE, *DESYNCS),
    *number_drills.CATALOGUE,
    *resource_drills.CATALOGUE,
    *detector_drills.CATALOGUE,
    # Nobody is left to be told of a loss: what becomes of it is judged by rules of its own.
    *rot_drills.CATALOGUE,
)

#: How often such a fault has to strike before a drill says anything.
STRIKES: dict[str, int] = {**multi_drills.STRUCK, FLAP: 3, CHURN: 3, SHRINK_GROW: 2}

#: Steps between the two losses of "shrink-grow": fewer than anybody needs to come back.
SHRINK_STEPS = 1

#: Faults of two seats.
_OF_TWO = (*LINK_FAULTS, SHRINK_GROW, TWO_AT_ONCE)

#: Faults over time, and of links: no step has them.
_OF_NO_POINT = (FLAP, JOIN, CHURN, PREEMPT, *LINK_FAULTS, *pace_drills.CATALOGUE)

#: What a training thread does to itself.
_USERS = frozenset(set(Kind) - {Kind.KILL, Kind.STOP, Kind.HANG})

#: Points at which a bucket is named.
_OF_BUCKETS = (Point.BACKWARD, Point.ALL_REDUCE, Point.IN_COLLECTIVE)

#: Buckets of gradients that a drill may aim at; a job with fewer is hit at its last one.
BUCKETS = 3

#: What a step of the bundled job takes longer while a seat is empty, in drills of members: less,
#: and a job of 200 steps may end before a rank is back for the third time.
SHORT_HANDED_S = 0.25

#: What each of three nodes of the bundled job writes in its first checkpoint, about.
STORE_BYTES = 1_000_000

#: What each has written by the time when it is known how long that takes.
USUAL_BYTES = 4 * STORE_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Drill:
    """One drill, fully decided: running it again does the same."""

    fault: str
    phase: Point | None
    """None for faults that are outside the ranks."""
    seat: int
    step: int
    bucket: int
    delay_s: float
    seed: int
    byte: int = 0
    """Of faults of the disk: at which byte of what the node writes. Of those in a collective:
    at which byte of what the rank moves."""
    nodes: tuple[int, ...] = ()
    """The nodes that are lost, for faults of nodes."""
    second_seat: int | None = None
    """Who is hit in recovery, when `phase` is that; `seat` is then killed first, in forward. For
    faults of links: the other end."""
    corruption: PlannedCorruption | None = None
    """For faults of numbers: what is falsified."""
    seats: tuple[int, ...] = ()
    """All who are struck, where several are."""
    place: str = ""
    """For faults of detectors and of checkpoints: what is struck."""

    @property
    def where(self) -> str:
        """The phase as a person writes it."""
        if self.store_fault is not None:
            return f"byte {self.byte}"
        if self.place:
            return self.place
        if self.corruption is not None:
            return number_drills.place_of(self.corruption)
        if self.phase is None:
            return "any"
        lasting = self.phase in _OF_BUCKETS
        return f"{self.phase}:{self.bucket}" if lasting else self.phase.value

    @property
    def store_fault(self) -> StoreFault | None:
        """What the agents are told to do to themselves; there is one rank a node then."""
        if self.fault not in set(StoreFaultKind):
            return None
        kind = StoreFaultKind(self.fault)
        return StoreFault(kind=kind, node=self.seat, seat=self.seat, byte=self.byte)

    @property
    def pace(self) -> PacePlan | None:
        """How the rank loses time, in drills of that."""
        if self.fault == TWO_AT_ONCE:
            assert self.second_seat is not None, "two ranks are hit"
            return replace(
                pace_drills.slowed(seed=self.seed, seat=self.second_seat), step=self.step
            )
        if self.fault not in pace_drills.CATALOGUE:
            return None
        return pace_drills.choose_pace(self.fault, seed=self.seed, seat=self.seat)

    def faults(self) -> list[PlannedFault]:
        """What the ranks are told to do to themselves."""
        if self.fault == SHRINK_GROW:
            assert self.second_seat is not None, "two ranks are hit"
            assert self.phase is not None, "the seed picks one"
            first = self._fault(Kind.KILL, self.phase, self.seat)
            second = self._fault(Kind.KILL, self.phase, self.second_seat)
            return [first, replace(second, step=self.step + SHRINK_STEPS)]
        if self.phase is None:
            return []
        if self.fault in multi_drills.CATALOGUE and self.phase is not Point.RECOVERY:
            return [self._fault(Kind.KILL, self.phase, seat) for seat in self.seats]
        kills = (KILL_IN_COLLECTIVE, STAGE_LOST, SPARE, TWO_AT_ONCE, *multi_drills.CATALOGUE)
        kind = Kind.KILL if self.fault in kills else Kind(self.fault)
        if self.phase is Point.RECOVERY:
            assert self.second_seat is not None, "two ranks are hit"
            first = self._fault(Kind.KILL, Point.FORWARD, self.seat)
            return [first, self._fault(kind, Point.RECOVERY, self.second_seat)]
        return [self._fault(kind, self.phase, self.seat)]

    def _fault(self, kind: Kind, point: Point, seat: int) -> PlannedFault:
        # The first member of a seat has its number.
        return PlannedFault(
            kind=kind,
            point=point,
            seat=seat,
            member=seat,
            step=self.step,
            bucket=self.bucket if point in _OF_BUCKETS else 0,
            delay_s=self.delay_s,
            byte=self.byte,
        )


def choose(fault: str, at: str | None, *, seed: int, nproc: int, steps: int) -> Drill:
    """The drill that `seed` makes of what was asked; pure.

    Args:
      fault: a name of the catalogue, or "all" to let the seed pick.
      at: a phase, perhaps with a bucket ("backward:1"); None lets the seed pick.
      seed: decides the rest.
      nproc: ranks of the job.
      steps: steps of the job; the fault strikes in their first third, so that the rank that
        was lost can come back and train.

    Raises:
      UsageError: there is no such fault or phase, or the job is too small for it.
    """
    rng = random.Random(f"{fault} {at} {seed}")
    name = rng.choice(ANYWHERE) if fault == "all" else fault
    if name == DESYNC:
        name = rng.choice(sorted(DESYNCS))
    if name not in CATALOGUE:
        every = ", ".join([*CATALOGUE, *NODE_CATALOGUE])
        raise UsageError(f"there is no drill {name!r}; choose among {every}, all")
    between = (*rot_drills.CATALOGUE, *restart_drill.CATALOGUE)
    if name in between and at is not None:
        raise UsageError(f"{name} strikes between steps: leave --at out")
    if name in restart_drill.CATALOGUE:
        if nproc < 2:
            raise UsageError(f"{name} needs --nproc 2 or more: it goes on with one fewer")
        return Drill(
            fault=name,
            phase=None,
            seat=0,
            step=rng.randint(max(1, steps // 3), max(1, 2 * steps // 3)),
            bucket=0,
            delay_s=0.0,
            seed=seed,
        )
    rots = (name, at) == (number_drills.BIT_FLIP, CHECKPOINT)
    if name in detector_drills.CATALOGUE or name in rot_drills.CATALOGUE or rots:
        detector = name in detector_drills.CATALOGUE
        return Drill(
            fault=name,
            phase=None,
            seat=rng.randrange(nproc),
            step=rng.randint(3, max(3, steps // 5)),
            bucket=0,
            delay_s=0.0,
            seed=seed,
            place=detector_drills.choose_place(at, seed=seed, nproc=nproc)
            if detector
            else CHECKPOINT
            if rots
            else ALL_NODES,
        )
    if name in number_drills.CATALOGUE:
        wrong = number_drills.choose(name, at, seed=seed, nproc=nproc, steps=steps)
        return Drill(
            fault=name,
            phase=None,
            seat=wrong.seat,
            step=wrong.step,
            bucket=wrong.bucket,
            delay_s=0.0,
            seed=seed,
            corruption=wrong,
        )
    if name in resource_drills.CATALOGUE:
        resource_drills.check(name, nproc, at)
        return Drill(
            fault=name,
            phase=None,
            seat=rng.randrange(nproc),
            step=rng.randint(3, max(3, steps // 5)),
            bucket=0,
            delay_s=0.0,
            seed=seed,
        )
    point, bucket = _point(at, rng)
    if name == SHRINK_GROW:
        if point is Point.RECOVERY:
            point = Point.FORWARD  # that of the one would be the other's
    elif name == KILL_COORDINATOR or name in set(StoreFaultKind) or name in _OF_NO_POINT:
        point = None
    if name in DESYNCS:
        point = Point.BACKWARD
    if name == SPARE and point is Point.RECOVERY:
        point = Point.FORWARD  # one spare replaces one rank
    if name == TWO_AT_ONCE and point in (Point.RECOVERY, Point.IN_COLLECTIVE):
        point = Point.FORWARD
    if name == STAGE_LOST and point in (Point.ALL_REDUCE, Point.IN_COLLECTIVE):
        point = Point.BACKWARD  # stages send and receive, and reduce nothing
    if name == KILL_IN_COLLECTIVE:
        point = Point.IN_COLLECTIVE
    if nproc < RANKS_MIN.get(name, 1):
        raise UsageError(f"{name} needs --nproc {RANKS_MIN[name]} or more, got {nproc}")
    if point is Point.IN_COLLECTIVE and name in (Kind.RAISE, Kind.HANG):
        raise UsageError(f"{name} cannot strike at a byte of a collective; use --at all-reduce")
    if name == StoreFaultKind.KILL and nproc < 2:
        raise UsageError("an agent takes its ranks along: torn-write needs --nproc 2 or more")
    if point is Point.RECOVERY and nproc < 3:
        if at is not None:
            raise UsageError("a fault in recovery hits a second rank: it needs --nproc 3 or more")
        point = Point.FORWARD
    if name in _USERS and point in (Point.RECOVERY, Point.IN_COLLECTIVE):
        point = Point.FORWARD  # no user code runs there
    first, second = rng.sample(range(nproc), 2) if nproc > 1 else (0, None)
    seats: tuple[int, ...] = ()
    if name in multi_drills.CATALOGUE:
        assert point is not None, "it is given, or picked"
        struck = multi_drills.choose(name, point, seed=seed, nproc=nproc)
        point, seats, first = struck.phase, struck.seats, struck.seats[0]
        second = seats[-1]
    return Drill(
        fault=str(name),
        phase=point,
        seat=first,
        seats=seats,
        second_seat=second if point is Point.RECOVERY or name in _OF_TWO else None,
        step=rng.randint(3, max(3, steps // 5))
        + (NAMED_FROM if name in (*NAMES, TWO_AT_ONCE) else 0),
        bucket=bucket,
        delay_s=rng.uniform(0, 0.004),
        seed=seed,
        byte=rng.randrange(STORE_BYTES) + (USUAL_BYTES if name == StoreFaultKind.SLOW else 0),
    )


def choose_nodes(fault: str, job: "Job", *, seed: int) -> Drill:
    """The drill of whole nodes that `seed` makes; pure.

    Args:
      fault: one of `NODE_FAULTS`.
      job: what it is done to (`Job.for_nodes`).
      seed: decides which nodes, and when.

    Raises:
      UsageError: the job has no parity, or it is on machines that the drill cannot reach.
    """
    rng = random.Random(f"{fault} {seed}")
    code = Code.parse(job.parity)
    if fault != LOSE_NODE and code is None:
        raise UsageError(f"{fault} leaves nothing but parity: give --parity k+m")
    if fault != LOSE_NODE and job.engine != "embedded":
        raise UsageError(f"{fault} kills ranks on every node: it needs --engine embedded")
    count = code.m if fault == LOSE_NODES and code is not None else 1
    # Which nodes corrupt shards lie on is known only once there are some.
    lost = () if fault == CORRUPT_SHARD else tuple(sorted(rng.sample(range(job.nodes), count)))
    return Drill(
        fault=fault,
        phase=None,
        seat=lost[0] * job.nproc if lost else 0,
        step=rng.randint(5, max(5, job.steps // 5)),
        bucket=0,
        delay_s=0.0,
        seed=seed,
        nodes=lost,
    )


def _point(at: str | None, rng: random.Random) -> tuple[Point | None, int]:
    bucket = rng.randrange(BUCKETS)
    if at is None:
        # Not one that only some faults can strike at.
        return rng.choice([p for p in Point if p is not Point.IN_COLLECTIVE]), bucket
    match = re.fullmatch(r"([a-z-]+)(?::(\d+))?", at)
    if match is None or match[1] not in set(Point):
        raise UsageError(f"there is no phase {at!r}; choose among {', '.join(Point)}")
    return Point(match[1]), int(match[2]) if match[2] else bucket


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
        return replace(self, workload=(*self.workload, "--device-s", str(seconds)))

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
        return stop, read_run(run_dir)


def run_drill(
    drill: Drill,
    job: Job,
    reference: list[dict[str, Any]] | None,
    run_dir: Path,
    *,
    on_poll: Callable[[Engine], None] | None = None,
) -> tuple[Outcome, list[dict[str, Any]]]:
    """Do one drill and judge it. Blocks. Returns the outcome and the disturbed run's events."""
    if drill.fault in restart_drill.CATALOGUE:
        return restart_drill.run_restart(drill, job, reference, run_dir)
    witness, settings = Witness(run_dir), dict[str, Any]()
    of_nodes = {*resource_drills.CATALOGUE, *detector_drills.CATALOGUE}
    if drill.store_fault is not None or drill.fault in of_nodes:
        # A node is what is struck, so that what is left of the job is worth a look.
        job = job if job.nodes > 1 else replace(job, nodes=job.nproc, nproc=1)
    if drill.store_fault is not None:
        settings = witness.settings(drill.store_fault, job.steps)
    if drill.corruption is not None:
        settings = {"env": corruption_environ([drill.corruption])}
        if job.script is None:
            job = replace(job, workload=(*job.workload, *number_drills.workload(drill.corruption)))
    job_id = new_job_id()
    striker: Callable[[Engine], None] | None = None
    ends = contextlib.ExitStack()
    if drill.fault == KILL_COORDINATOR:
        striker = CoordinatorKiller(drill, run_dir).poll
    elif drill.fault == PREEMPT:
        from ftkit.launch.member_drills import Preempter

        job = job if job.nodes > 1 else replace(job, nodes=job.nproc, nproc=1)
        striker = Preempter(drill, job, run_dir).poll
    elif drill.fault in NODE_FAULTS:
        from ftkit.launch.node_drills import NodeStriker

        striker = NodeStriker(drill, job, job_id, run_dir).poll
    elif drill.fault in (FLAP, JOIN, CHURN):
        from ftkit.launch.member_drills import MemberStriker

        striker = MemberStriker(drill, job, run_dir).poll
    elif drill.fault in LINK_FAULTS:
        from ftkit.launch.link_drills import LinkStriker

        links = LinkStriker(drill, job, run_dir)
        ends.callback(links.close)
        striker, settings = links.poll, links.settings
    elif drill.fault in resource_drills.CATALOGUE:
        around = resource_drills.ResourceStriker(
            drill.fault,
            seat=drill.seat,
            step=drill.step,
            seed=drill.seed,
            nodes=job.nodes,
            run_dir=run_dir,
            shm=JobConfig(job=job_id, command=("-",)).shm_dir(drill.seat // job.nproc),
        )
        ends.callback(around.close)
        striker, settings = around.poll, around.settings
    elif drill.fault in detector_drills.CATALOGUE:
        shm = JobConfig(job=job_id, command=("-",)).shm_dir(drill.seat // job.nproc)
        blinded = detector_drills.DetectorStriker(
            drill.place, seat=drill.seat, step=drill.step, run_dir=run_dir, shm=shm
        )
        ends.callback(blinded.close)
        striker = blinded.poll
        job = replace(job, max_stall_s=min(job.max_stall_s, detector_drills.MAX_STALL_S))
    elif drill.place in (CHECKPOINT, ALL_NODES):
        rot = rot_drills.RotStriker(
            seed=drill.seed,
            nodes=job.nodes,
            steps=job.steps,
            run_dir=run_dir,
            rots=drill.place == CHECKPOINT,
        )
        striker, settings = rot.poll, rot.settings
    elif drill.fault == TWO_AT_ONCE or drill.fault in pace_drills.CATALOGUE:
        pace = pace_drills.PaceStriker(drill.fault, drill.pace, run_dir)
        ends.callback(pace.close)
        striker, settings = pace.poll, pace.settings

    def poll(engine: Engine) -> None:
        if striker is not None:
            striker(engine)
        witness.poll()
        if on_poll is not None:
            on_poll(engine)

    with ends:
        _, events = job.run(
            run_dir, faults=drill.faults(), on_poll=poll, job_id=job_id, settings=settings
        )
    outcome = check(events, reference, _expected(drill, job, reference or events))
    if drill.store_fault is not None:
        outcome = witness.judge(outcome, events, seat=drill.seat)
    elif drill.fault == JOIN:
        from ftkit.launch.member_drills import judge_join

        outcome = judge_join(outcome, events)
    elif drill.fault == SHRINK_GROW:
        from ftkit.launch.member_drills import judge_shrink_grow

        outcome = judge_shrink_grow(outcome, events, job.world_size)
    elif drill.fault == PREEMPT:
        from ftkit.launch.member_drills import judge_preempt

        outcome = judge_preempt(outcome, events)
    elif drill.fault == SPARE:
        from ftkit.launch.member_drills import judge_spare

        outcome = judge_spare(outcome, events)
    elif drill.fault == STAGE_LOST:
        from ftkit.launch.member_drills import judge_stage_lost

        outcome = judge_stage_lost(outcome, events, job.world_size)
    elif drill.fault in LINK_FAULTS:
        from ftkit.launch.link_drills import judge_link

        outcome = judge_link(outcome, drill, job.world_size, events)
    elif drill.corruption is not None:
        outcome = number_drills.judge(outcome, events, drill.corruption)
    elif drill.fault in resource_drills.CATALOGUE:
        outcome = resource_drills.judge(outcome, events, drill.seat)
    elif drill.fault in detector_drills.CATALOGUE:
        outcome = detector_drills.judge(outcome, events, place=drill.place, seat=drill.seat)
    elif drill.place == CHECKPOINT:
        outcome = rot_drills.judge(outcome, events)
    elif drill.place == ALL_NODES:
        outcome = rot_drills.judge_all_nodes(outcome, events)
    elif drill.fault == TWO_AT_ONCE:
        assert drill.second_seat is not None, "two ranks are hit"
        outcome = pace_drills.judge_two(
            outcome, events, killed=drill.seat, slowed=drill.second_seat
        )
    elif drill.fault in pace_drills.CATALOGUE:
        outcome = pace_drills.judge_pace(outcome, events, drill.pace)
    return outcome, events


def _expected(drill: Drill, job: Job, events: list[dict[str, Any]]) -> Expectation:
    """What the checker is to hold a run against; `events` are of the job undisturbed, if any."""
    told = expectation_of(events)
    return Expectation(
        fault=drill.fault,
        phase=drill.where,
        seed=drill.seed,
        world_size=job.world_size,
        spares=job.spares * job.nodes,
        # A script of the user's sets its own sizes; its undisturbed run tells them.
        steps=told.steps if job.script else job.steps,
        slots=told.slots if job.script else job.slots,
        slot_size=told.slot_size if job.script else job.slot_size,
        evicts=drill.fault not in _NOBODY_LOST,
        loses_all=drill.fault in (LOSE_NODES, CORRUPT_SHARD)
        or drill.place in (CHECKPOINT, ALL_NODES),
        corrupts=drill.fault == CORRUPT_SHARD,
        alters=drill.corruption is not None and number_drills.alters(drill.corruption),
        strikes=STRIKES.get(drill.fault, 1),
        steps_back=SHARDS_BACK if job.sharded or job.stages else 0,
        names=NAMES.get(drill.fault, frozenset()),
    )


class CoordinatorKiller:
    """Kills the coordinator once the job has committed the drill's step."""

    def __init__(self, drill: Drill, run_dir: Path) -> None:
        self._step = drill.step
        self._run_dir = run_dir
        self._tail = EventTail(run_dir)
        self._done = False

    def poll(self, engine: Engine) -> None:
        """Strike when it is time. Called while the job runs."""
        if self._done:
            return
        reached = any(e["kind"] == "commit" and e["step"] >= self._step for e in self._tail.poll())
        if reached:
            self._done = True
            with Trace(self._run_dir / "events" / f"drill-{os.getpid()}.jsonl") as trace:
                trace.event("drill", fault=KILL_COORDINATOR, phase="any", step=self._step)
            engine.kill_coordinator()
