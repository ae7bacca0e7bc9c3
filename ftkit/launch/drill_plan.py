"""Drill: one drill fully decided, and how a seed decides it. Pure."""

import random
import re
from dataclasses import dataclass, replace

from ftkit.checkpoint.stripes import Code
from ftkit.core.corruption_plan import PlannedCorruption
from ftkit.core.errors import UsageError
from ftkit.core.fault_plan import DESYNCS, KILL_COORDINATOR, Kind, PlannedFault, Point
from ftkit.core.pace_plan import PacePlan
from ftkit.launch import (
    detector_drills,
    mixed_drills,
    multi_drills,
    number_drills,
    pace_drills,
    resource_drills,
    restart_drill,
    rot_drills,
)
from ftkit.launch.choices import near
from ftkit.launch.drill_catalogue import (
    ANYWHERE,
    BUCKETS,
    CATALOGUE,
    CORRUPT_SHARD,
    DESYNC,
    KILL_IN_COLLECTIVE,
    LOSE_NODES,
    NAMED_FROM,
    NAMES,
    NODE_CATALOGUE,
    OF_BUCKETS,
    OF_NO_POINT,
    OF_TWO,
    PARTITION_HALF,
    RANKS_MIN,
    SHRINK_GROW,
    SHRINK_STEPS,
    SPARE,
    STAGE_LOST,
    STORE_BYTES,
    TWO_AT_ONCE,
    USERS,
    USUAL_BYTES,
)
from ftkit.launch.drill_faults import LOSE_NODE
from ftkit.launch.drill_job import Job
from ftkit.launch.faulty_store import StoreFault, StoreFaultKind
from ftkit.launch.mixed_drills import MIXED, POINTS, Mixed
from ftkit.launch.rot_drills import ALL_NODES, CHECKPOINT


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
    mixed: Mixed | None = None
    """For several faults of different kinds: all of them."""

    @property
    def where(self) -> str:
        """The phase as a person writes it."""
        if self.store_fault is not None:
            return f"byte {self.byte}"
        if self.place:
            return self.place
        if self.mixed is not None:
            return self.mixed.where
        if self.corruption is not None:
            return number_drills.place_of(self.corruption)
        if self.phase is None:
            return "any"
        lasting = self.phase in OF_BUCKETS
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
        if self.mixed is not None:
            return list(self.mixed.faults)
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
            bucket=self.bucket if point in OF_BUCKETS else 0,
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
        every = [*CATALOGUE, *NODE_CATALOGUE, "all"]
        raise UsageError(
            f"there is no drill {name!r}; choose among {', '.join(every)}{near(name, every)}"
        )
    between = (*rot_drills.CATALOGUE, *restart_drill.CATALOGUE)
    if name in between and at is not None:
        raise UsageError(f"{name} strikes between steps: leave --at out")
    if name in restart_drill.CATALOGUE:
        if nproc < 2 and name == restart_drill.RESTART_SMALLER:
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
    if name == MIXED:
        if at is not None:
            raise UsageError(f"the phases of {name} are picked by the seed: leave --at out")
        if nproc < RANKS_MIN[name]:
            raise UsageError(f"{name} needs --nproc {RANKS_MIN[name]} or more, got {nproc}")
        mixed = mixed_drills.choose(seed=seed, nproc=nproc, steps=steps)
        first_fault = mixed.faults[0] if mixed.faults else None
        return Drill(
            fault=name,
            phase=None,
            seat=first_fault.seat if first_fault else 0,
            step=first_fault.step if first_fault else mixed.coordinator_step or 0,
            bucket=0,
            delay_s=0.0,
            seed=seed,
            mixed=mixed,
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
    elif name == KILL_COORDINATOR or name in set(StoreFaultKind) or name in OF_NO_POINT:
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
    if name in USERS and point in (Point.RECOVERY, Point.IN_COLLECTIVE):
        point = Point.FORWARD  # no user code runs there
    first, second = rng.sample(range(nproc), 2) if nproc > 1 else (0, None)
    seats: tuple[int, ...] = ()
    if name in multi_drills.CATALOGUE:
        assert point is not None, "it is given, or picked"
        struck = multi_drills.choose(name, point, seed=seed, nproc=nproc)
        point, seats, first = struck.phase, struck.seats, struck.seats[0]
        second = seats[-1]
    if name == PARTITION_HALF:
        seats = tuple(sorted(rng.sample(range(nproc), nproc // 2)))
        first, second = seats[0], next(s for s in range(nproc) if s not in seats)
    return Drill(
        fault=str(name),
        phase=point,
        seat=first,
        seats=seats,
        second_seat=second if point is Point.RECOVERY or name in OF_TWO else None,
        step=rng.randint(3, max(3, steps // 5))
        + (NAMED_FROM if name in (*NAMES, TWO_AT_ONCE) else 0),
        bucket=bucket,
        delay_s=rng.uniform(0, 0.004),
        seed=seed,
        byte=rng.randrange(STORE_BYTES) + (USUAL_BYTES if name == StoreFaultKind.SLOW else 0),
    )


def choose_nodes(fault: str, job: "Job", *, at: str | None = None, seed: int) -> Drill:
    """The drill of whole nodes that `seed` makes; pure.

    Args:
      fault: one of `NODE_FAULTS`.
      job: what it is done to (`Job.for_nodes`).
      at: a phase, which no drill of whole nodes has.
      seed: decides which nodes, and when.

    Raises:
      UsageError: the job has no parity, or it is on machines that the drill cannot reach; or a
        phase was asked for.
    """
    if at is not None:
        raise UsageError(f"{fault} strikes a node from outside, in whatever phase: leave --at out")
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
        return rng.choice([p for p in POINTS if p is not Point.IN_COLLECTIVE]), bucket
    match = re.fullmatch(r"([a-z-]+)(?::(\d+))?", at)
    if match is None or match[1] not in POINTS:
        hint = near(at.partition(":")[0], list(POINTS))
        raise UsageError(f"there is no phase {at!r}; choose among {', '.join(POINTS)}{hint}")
    return Point(match[1]), int(match[2]) if match[2] else bucket
