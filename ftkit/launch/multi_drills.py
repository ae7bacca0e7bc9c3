"""Several ranks lost at once or one after another, and the one that has number 0: who, and when. Pure."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from ftkit.core.fault_plan import Point

LOSE_DURING_RECOVERY: Final = "lose-during-recovery"
DOUBLE: Final = "double"
TRIPLE: Final = "triple"
RANK_0: Final = "rank-0"

CATALOGUE: Final[Mapping[str, str]] = {
    LOSE_DURING_RECOVERY: "SIGKILL to one rank, and to another as it enters the world without the first",
    DOUBLE: "SIGKILL to two ranks in the same phase of the same step",
    TRIPLE: "SIGKILL to three ranks in the same phase of the same step",
    RANK_0: "SIGKILL to rank 0, whose buffers and initial values the others take",
}

#: How many ranks are struck.
STRUCK: Final[Mapping[str, int]] = {LOSE_DURING_RECOVERY: 2, DOUBLE: 2, TRIPLE: 3, RANK_0: 1}

#: Somebody has to survive.
RANKS_MIN: Final[Mapping[str, int]] = {name: 1 + count for name, count in STRUCK.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Struck:
    """Where, and whom."""

    phase: Point
    seats: tuple[int, ...]


def choose(fault: str, phase: Point, *, seed: int, nproc: int) -> Struck:
    """What `seed` makes of a fault, at a phase that was asked for or picked.

    Args:
      fault: of the catalogue.
      phase: in which all are struck; in recovery nobody but the second of two can be.
      seed: decides who.
      nproc: ranks of the job, at least `RANKS_MIN` of the fault.
    """
    seats = random.Random(f"{fault} seats {seed}").sample(range(nproc), STRUCK[fault])
    if fault == LOSE_DURING_RECOVERY:
        return Struck(phase=Point.RECOVERY, seats=tuple(seats))
    if phase in (Point.RECOVERY, Point.IN_COLLECTIVE):
        phase = Point.ALL_REDUCE
    return Struck(phase=phase, seats=(0,) if fault == RANK_0 else tuple(seats))
