"""One to three faults of any kinds in one run, each of another rank, at moments of their own. Pure.

Steps are near each other, so that the next often strikes while the last is being repaired, or its
rank is on its way back; in one run in four one of the faults takes the coordinator instead.
"""

import random
from dataclasses import dataclass
from typing import Final

from ftkit.core.fault_plan import Kind, PlannedFault, Point

MIXED: Final = "mixed"
CATALOGUE: Final = {
    MIXED: "one to three faults of different ranks, or of the coordinator, in one run"
}

#: Faults at most, and ranks at least: somebody has to survive.
FAULTS_MAX = 3
RANKS_MIN: Final = {MIXED: FAULTS_MAX + 1}
#: Most faults are deaths, as in life.
_KINDS = (Kind.KILL, Kind.KILL, Kind.KILL, Kind.STOP, Kind.RAISE, Kind.HANG)
#: From one fault to the next, in steps: in the same, while the last is repaired, or after that.
_APART = (0, 0, 1, 2, 5, 20)
#: Share of runs in which the coordinator is struck.
_COORDINATOR = 0.25
#: Where no code of the user's runs.
_NO_USER = (Point.RECOVERY, Point.IN_COLLECTIVE)
#: Points that every job comes to.
POINTS: Final = tuple(point for point in Point if point is not Point.MIGRATION)
#: Where a bucket of gradients is aimed at, and among how many; of fewer the last is hit.
_OF_BUCKETS, _BUCKETS = (Point.BACKWARD, Point.ALL_REDUCE, Point.IN_COLLECTIVE), 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixed:
    """What strikes in one run."""

    faults: tuple[PlannedFault, ...]
    """Of ranks, in the order of their steps."""
    coordinator_step: int | None
    """The step at which the coordinator is killed; None: it is spared."""

    @property
    def count(self) -> int:
        """Faults in all."""
        return len(self.faults) + (self.coordinator_step is not None)

    @property
    def where(self) -> str:
        """All of it, as a person writes it."""
        told = [f"{f.kind} at {f.point} of {f.step}" for f in self.faults]
        if self.coordinator_step is not None:
            told.append(f"coordinator at {self.coordinator_step}")
        return ", ".join(told)


def choose(*, seed: int, nproc: int, steps: int) -> Mixed:
    """What `seed` makes of a job of `nproc` ranks, `RANKS_MIN` or more, and `steps` steps."""
    rng = random.Random(f"{MIXED} {seed}")
    count = rng.randint(1, FAULTS_MAX)
    coordinator = rng.random() < _COORDINATOR
    step = rng.randint(3, max(3, steps // 5))
    faults: list[PlannedFault] = []
    for seat in rng.sample(range(nproc), count - coordinator):
        kind, point = rng.choice(_KINDS), rng.choice(POINTS)
        if not faults and point is Point.RECOVERY:
            point = Point.FORWARD  # there is nothing yet to recover from
        if kind is not Kind.KILL and point in _NO_USER:
            point = Point.FORWARD
        if faults and point is not Point.RECOVERY:
            step += rng.choice(_APART)
        faults.append(
            PlannedFault(
                kind=kind,
                point=point,
                seat=seat,
                member=seat,  # the first member of a seat has its number
                step=step,
                bucket=rng.randrange(_BUCKETS) if point in _OF_BUCKETS else 0,
                delay_s=rng.uniform(0, 0.004),
                byte=rng.randrange(1_000_000),
            )
        )
    at = step + rng.choice(_APART) if coordinator else None
    return Mixed(faults=tuple(faults), coordinator_step=at)
