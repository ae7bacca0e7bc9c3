"""Faults: several a job, planned from a seed, and what the events say of each; pure.

Faults are planned for the first member of each seat (its number is the seat's), so a job of N
ranks hosts up to N of them, one after another, `GAP` steps apart: time for the process that
replaces a dead one to start and to train again. A fault that strikes before the one before it
was healed is told (`whole` is False) and not counted.
"""

import random
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.jobs import Event
from ftkit.core.fault_plan import Kind, PlannedFault, Point

#: Where in a step a fault may strike. In recovery it would be a second fault of the first one, at a
#: byte of a collective not every kind of fault can strike, and a migration is not of every step.
POINTS = tuple(p for p in Point if p not in (Point.RECOVERY, Point.IN_COLLECTIVE, Point.MIGRATION))

#: The first steps are not struck: DDP and the snapshots are being set up.
FIRST = 20

#: How far a fault's step is moved at random.
JITTER = 10


def plan_faults(
    rng: random.Random, kinds: Sequence[Kind], *, nproc: int, count: int, gap: int
) -> list[PlannedFault]:
    """Faults for one job; pure but for `rng`.

    Args:
      rng: decides seats, kinds, phases and moments.
      kinds: what may happen.
      nproc: ranks of the job.
      count: faults wanted, at most `nproc`.
      gap: steps between two faults.
    """
    seats = rng.sample(range(nproc), count)
    return [
        PlannedFault(
            kind=rng.choice(kinds),
            point=rng.choice(POINTS),
            seat=seat,
            member=seat,
            step=FIRST + i * gap + rng.randrange(JITTER),
            delay_s=rng.uniform(0, 0.004),
        )
        for i, seat in enumerate(seats)
    ]


def steps_for(count: int, gap: int) -> int:
    """Steps of a job that hosts `count` faults and is whole again at its end."""
    return FIRST + JITTER + count * gap


@dataclass(frozen=True, slots=True, kw_only=True)
class Repair:
    """One fault and what followed, in seconds after its injection. None: it did not happen."""

    fault: str
    phase: str
    seat: int
    step: int
    survivors: int
    whole: bool
    """Whether every seat was training when it struck."""
    detect_s: float | None
    """To the first verdict against the victim, or the first halt."""
    replay_s: float | None
    """Until the last survivor began a step in a newer generation: the one that was cut short,
    or, where that one was rolled forward, the one after it."""
    repair_s: float | None
    """Until the last survivor had committed a step in a newer generation."""
    back_s: float | None
    """Until the victim's seat committed a step again."""


def follow(events: Iterable[Event], *, nproc: int) -> list[Repair]:
    """Every fault of a run, in order of time; pure.

    Only a newer generation counts as repaired, because a vote that was already passing may
    still end in a commit of the old one (rule R6 of the drills' checker).
    """
    ordered = sorted(events, key=lambda e: float(e["mono"]))
    return [_follow(ordered, e, nproc) for e in ordered if e["kind"] == "drill"]


def _follow(events: Sequence[Event], fault: Event, nproc: int) -> Repair:
    at, victim, seat = float(fault["mono"]), fault["member"], fault["seat"]
    before = [e for e in events if e["mono"] <= at]
    after = [e for e in events if e["mono"] > at]
    acts = [e for e in before if e["kind"] in ("attempt", "vote", "commit")]
    gone = {e["member"] for e in before if e["kind"] in ("exit", "drill")}
    survivors = {e["member"] for e in acts} - gone
    generation = max((int(e["generation"]) for e in acts), default=0)
    newest = {e["member"] for e in acts if e["generation"] == generation}

    def last_of(kind: str) -> float | None:
        firsts = dict[int, float]()
        for e in after:
            if e["kind"] == kind and e["member"] in survivors and e["generation"] > generation:
                firsts.setdefault(e["member"], float(e["mono"]))
        done = firsts.keys() == survivors and firsts
        return round(max(firsts.values()) - at, 6) if done else None

    seen = [
        float(e["mono"])
        for e in after
        if e["kind"] == "halt" or (e["kind"] == "verdict" and e["member"] == victim)
    ]
    back = [
        float(e["mono"])
        for e in after
        if e["kind"] == "commit" and e["seat"] == seat and e["member"] != victim
    ]
    return Repair(
        fault=str(fault["fault"]),
        phase=str(fault["phase"]),
        seat=seat,
        step=int(fault["step"]),
        survivors=len(survivors),
        whole=len(newest) == nproc,
        detect_s=round(min(seen) - at, 6) if seen else None,
        replay_s=last_of("attempt"),
        repair_s=last_of("commit"),
        back_s=round(min(back) - at, 6) if back else None,
    )


def step_times(events: Iterable[Event], *, size: int) -> list[float]:
    """Seconds between commits, one after another, of each member in worlds of `size`; pure.

    The first interval of a generation is left out: a repair or a join is in it.
    """
    moments = dict[tuple[int, int], list[float]]()
    for e in events:
        if e["kind"] == "commit":
            moments.setdefault((e["generation"], e["member"]), []).append(float(e["mono"]))
    members = dict[int, int]()
    for generation, _ in moments:
        members[generation] = members.get(generation, 0) + 1
    return [
        later - sooner
        for (generation, _), times in moments.items()
        if members[generation] == size
        for sooner, later in zip(sorted(times), sorted(times)[1:], strict=False)
    ]


def median_step(events: Iterable[Event], *, size: int) -> float:
    """The median of `step_times`. ValueError when there is none."""
    times = step_times(events, size=size)
    if not times:
        raise ValueError(f"no world of {size} members committed two steps")
    return statistics.median(times)
