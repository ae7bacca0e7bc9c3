"""Rebalance: how many slots of the global batch each rank takes, by how fast it is. Pure.

A step is as long as its slowest rank, so slots go where they are done first. Two ways, by what the
job promises:

* whole slots (`bitwise`): a slot stays one micro-batch of fixed shape, and only how many a rank
  has changes. Each slot weighs the same, so the canonical sum has the same bits.
* resized (`scaled`): a slot is one sample, so the batch is divided to the sample, and a rank plays
  several at once (`micro_batches`). Each rank's gradient is of a *sum* over its samples, divided by
  the global count: weights are exact, whatever the division; the sum's order differs, so it is equal
  up to rounding.

ElasWave (arXiv 2510.00606) calls this the dataflow dimension.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ftkit.core.ids import Slot


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """What one rank can do."""

    slot_s: float
    """Seconds a slot takes it, as measured."""
    fixed_s: float = 0.0
    """Seconds a step takes it whatever its slots: input, optimizer, exposed communication."""
    slots_max: int | None = None
    """The most it has memory for; None: any number."""

    def __post_init__(self) -> None:
        if not (self.slot_s > 0 and math.isfinite(self.slot_s)) or self.fixed_s < 0:
            raise ValueError(f"a slot takes time, and a step none that is negative, got {self}")
        if self.slots_max is not None and self.slots_max < 0:
            raise ValueError(f"no rank holds {self.slots_max} slots")


@dataclass(frozen=True, slots=True, kw_only=True)
class Division:
    """A plan, with what it promises."""

    slots: tuple[tuple[Slot, ...], ...]
    """The slots of each rank: contiguous, rank after rank, as the canonical tree wants them."""
    step_s: float
    """The slowest rank's time."""
    idle_s: tuple[float, ...]
    """How long each rank waits for it."""

    @property
    def counts(self) -> tuple[int, ...]:
        return tuple(len(held) for held in self.slots)

    @property
    def busy(self) -> float:
        """The share of all ranks' time that is not spent waiting."""
        total = self.step_s * len(self.slots)
        return 1 - sum(self.idle_s) / total if total else 1.0


def whole_slots(slots: int, speeds: Sequence[Speed]) -> Division:
    """Divide whole slots so that the slowest rank is done soonest.

    Each slot in turn goes to the rank that would be done first with it: for equal slots that is
    optimal. Of equals the lower rank takes it, so every rank finds the same division.

    Args:
      slots: of the global batch.
      speeds: of each rank, in order. Ranks may get none.

    Raises:
      ValueError: there is no rank, or memory for fewer slots than there are.
    """
    counts = [0] * len(speeds)
    queue = [(s.fixed_s + s.slot_s, rank) for rank, s in enumerate(speeds) if s.slots_max != 0]
    heapq.heapify(queue)
    for given in range(slots):
        if not queue:
            raise ValueError(f"{len(speeds)} ranks have memory for {given} of {slots} slots")
        done_s, rank = heapq.heappop(queue)
        counts[rank] += 1
        speed = speeds[rank]
        if speed.slots_max is None or counts[rank] < speed.slots_max:
            heapq.heappush(queue, (done_s + speed.slot_s, rank))
    return divided(counts, speeds)


def divided(counts: Sequence[int], speeds: Sequence[Speed]) -> Division:
    """The division with `counts` slots on each rank, and how long its step takes."""
    took = [s.fixed_s + n * s.slot_s for n, s in zip(counts, speeds, strict=True)]
    step_s = max(took, default=0.0)
    held, first = [], 0
    for count in counts:
        held.append(tuple(Slot(s) for s in range(first, first + count)))
        first += count
    return Division(slots=tuple(held), step_s=step_s, idle_s=tuple(step_s - t for t in took))


def evenly(slots: int, speeds: Sequence[Speed]) -> Division:
    """The division that knows no speeds: even within one."""
    ranks = len(speeds)
    counts = [(r + 1) * slots // ranks - r * slots // ranks for r in range(ranks)]
    return divided(counts, speeds)
