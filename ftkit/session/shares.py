"""Shares: which slots this rank plays, in each world and after a loss in the middle of a step.

Where every rank holds the whole model. What a survivor has summed when the world breaks it keeps for
the next attempt at the same step, if its state is still the same by then.
"""

import statistics
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ftkit.core.ids import Generation, Slot
from ftkit.core.ids import Step as StepNumber
from ftkit.recovery.division import STEPS, Balance, Brought, first_division, rest_of
from ftkit.session.parts import Parts


@dataclass(frozen=True, slots=True, kw_only=True)
class Carried:
    """What is left of an attempt whose world broke, beside the sums."""

    step: StepNumber
    restores: int
    """How often this rank's state had been replaced."""
    done: frozenset[Slot]
    """Slots that were played to their end: of others the loss, or the buffers, may be missing."""
    losses: Mapping[Slot, float]
    after_first: list[torch.Tensor]
    """Buffers after slot 0, where that was played here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """One rank's part in one attempt."""

    division: tuple[tuple[Slot, ...], ...]
    """The slots of every rank's sum."""
    kept: tuple[Slot, ...]
    """Of this rank's, those that are summed already."""
    todo: tuple[Slot, ...]
    """And those it has to play."""


class Shares:
    """Of one step loop; the training thread's."""

    def __init__(self, parts: Parts, slots: int, *, rebalance: bool) -> None:
        """Nothing is divided yet."""
        self._parts, self._slots, self._rebalance = parts, slots, rebalance
        self._generation = Generation(0)
        """The world that `_balance` is of."""
        self._balance: Balance | None = None
        self._took: list[float] = []
        self._recent: deque[float] = deque(maxlen=STEPS)
        self._began = 0.0
        self.carried: Carried | None = None

    def divide(
        self, step: StepNumber, generation: Generation, summed: tuple[Sequence[int], Sequence[int]]
    ) -> Share:
        """This rank's share of an attempt. In the first of a world all ranks talk; blocks then.

        Args:
          step: to be played.
          generation: the world.
          summed: slots that this rank has summed, and those it has summed in part.

        Raises:
          GenerationAborted: the world ended meanwhile.
        """
        rank = self._parts.group.rank
        self._took.clear()
        if self._generation == generation and self._balance is not None:
            division = self._balance.division.slots
            return Share(division=division, kept=(), todo=division[rank])
        mine = Brought(
            step=step,
            kept=tuple(map(Slot, summed[0])),
            begun=tuple(map(Slot, summed[1])),
            slot_s=statistics.median(self._recent) if self._rebalance and self._recent else 0.0,
        )
        told = [mine]
        if self._parts.group.size > 1:
            told = [Brought.unpack(b) for b in self._parts.group.exchange(mine.pack()).wait()]
        first = first_division(self._slots, told)
        self._balance, self._generation = Balance(self._slots, first), generation
        if min(b.slot_s for b in told) > 0:
            self._tell(step, "by what ranks took in the world before")
        rest = rest_of(step, told, self._slots)
        if rest is None:
            return Share(division=first.slots, kept=(), todo=first.slots[rank])
        self._parts.trace.event(
            "salvage",
            step=step,
            generation=generation,
            kept=rest.kept[rank],
            todo=rest.todo[rank],
            share=rest.share,
        )
        return Share(division=rest.held, kept=rest.kept[rank], todo=rest.todo[rank])

    def began(self) -> None:
        """Work for a slot begins."""
        self._began = time.perf_counter()

    def ended(self, slots: int = 1) -> None:
        """Work has ended, for so many slots at once."""
        self._took.append((time.perf_counter() - self._began) / max(1, slots))

    @property
    def costs(self) -> dict[int, float]:
        """For the ballot: seconds of a slot in this attempt, as slot 0."""
        if not self._rebalance or not self._took:
            return {}
        return {0: statistics.median(self._took)}

    def hear(self, costs: Sequence[Mapping[int, float]], step: StepNumber) -> None:
        """The vote for `step` passed, and these are the ranks' costs."""
        if not self._rebalance or self._balance is None:
            return
        rank = self._parts.group.rank
        if costs[rank]:
            self._recent.append(costs[rank][0])
        reason = self._balance.hear([told.get(0, 0.0) for told in costs])
        if reason:
            self._tell(step, reason)

    def _tell(self, step: StepNumber, reason: str) -> None:
        assert self._balance is not None, "divided"
        self._parts.trace.event(
            "rebalance",
            step=step,
            generation=self._parts.group.world.generation,
            counts=self._balance.division.counts,
            reason=reason,
        )
