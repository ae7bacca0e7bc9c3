"""Division: which slots of the global batch each rank of a world plays, agreed by all of them. Pure.

Before its first step in a world each rank tells the others what it brings: slots of that step whose
gradients it has summed already, in the world that broke, and how fast it is. From the same answers
all compute the same division. Slots that somebody brings are played by nobody (`salvage`); the rest
is divided evenly, or by speed (`rebalance`).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from ftkit.core.errors import ProtocolError
from ftkit.core.ids import Slot, Step
from ftkit.recovery.rebalance import Division, Speed, divided, evenly, whole_slots
from ftkit.recovery.salvage import Salvage, salvage

#: A division is changed for one whose steps take at most this share of the time.
GAIN = 0.95
#: Steps measured before a division is thought over, and before it is again.
STEPS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Brought:
    """What one rank brings into a world."""

    step: Step = Step(0)
    """The step whose slots these are."""
    kept: tuple[Slot, ...] = ()
    """Slots that it has summed, in rising order."""
    begun: tuple[Slot, ...] = ()
    """Slots that it has summed in part: it alone can finish them."""
    slot_s: float = 0.0
    """Seconds a slot takes it; 0 where it has not measured any."""

    def pack(self) -> bytes:
        told = [self.step, list(self.kept), list(self.begun), self.slot_s]
        return json.dumps(told).encode()

    @classmethod
    def unpack(cls, data: bytes) -> "Brought":
        """Read what `pack` wrote. Raises ProtocolError on anything else."""
        try:
            step, kept, begun, slot_s = json.loads(data)
            return cls(
                step=Step(int(step)),
                kept=tuple(Slot(int(s)) for s in kept),
                begun=tuple(Slot(int(s)) for s in begun),
                slot_s=float(slot_s),
            )
        except (ValueError, TypeError) as error:
            raise ProtocolError(f"not what a rank brings: {data[:80]!r}") from error


def rest_of(step: Step, brought: Sequence[Brought], slots: int) -> Salvage | None:
    """How a step that broke goes on in this world; None when it is played from its beginning.

    Args:
      step: the step to be played first.
      brought: by all ranks, in order.
      slots: of the global batch.
    """
    mine = [b if b.step == step else Brought() for b in brought]
    claimed = [s for b in mine for s in (*b.kept, *b.begun)]
    if len(set(claimed)) < len(claimed) or any(not 0 <= s < slots for s in claimed):
        return None  # two sums with the same slot cannot be told apart again
    if not any(b.kept for b in mine):
        return None
    return salvage(slots, [b.kept for b in mine], [b.begun for b in mine])


def first_division(slots: int, brought: Sequence[Brought]) -> Division:
    """The division of a world that begins: by speed where every rank knows its own, or even."""
    known = [b.slot_s for b in brought]
    if min(known) <= 0:
        return evenly(slots, [Speed(slot_s=1.0)] * len(brought))
    return better(slots, evenly(slots, [Speed(slot_s=s) for s in known]), known)


def better(slots: int, now: Division, slot_s: Sequence[float]) -> Division:
    """The division by speed, if its steps are shorter by enough; else the one in force.

    Args:
      slots: of the global batch, at least as many as ranks.
      now: in force, by whatever speeds.
      slot_s: seconds a slot takes each rank, as measured.
    """
    speeds = [Speed(slot_s=s) for s in slot_s]
    # Each has one at least: who plays none is not measured any more.
    more = whole_slots(slots - len(speeds), [Speed(slot_s=s, fixed_s=s) for s in slot_s])
    then = divided([1 + count for count in more.counts], speeds)
    now = divided(now.counts, speeds)
    return then if then.step_s <= GAIN * now.step_s else now


class Balance:
    """The division in force in one world, thought over every few steps. The training thread's.

    All ranks hear the same and so change at the same step.
    """

    def __init__(self, slots: int, division: Division) -> None:
        """Begin a world with `division`."""
        self._slots = slots
        self.division = division
        self._heard: list[tuple[float, ...]] = []

    def hear(self, slot_s: Sequence[float]) -> str:
        """A step was voted through; each rank said how long a slot takes it now, 0: not known.

        Returns:
          Why the division is another one from the next step on; empty while it is not.
        """
        self._heard.append(tuple(slot_s))
        if len(self._heard) < STEPS:
            return ""
        window, self._heard = self._heard, []
        known = [sorted(x for x in rank if x > 0) for rank in zip(*window, strict=True)]
        if any(not values for values in known):
            return ""
        middle = [values[len(values) // 2] for values in known]
        before = divided(self.division.counts, [Speed(slot_s=s) for s in middle])
        after = better(self._slots, before, middle)
        if after.counts == before.counts:
            return ""
        self.division = after
        took = ", ".join(f"{s * 1e3:.3g}" for s in middle)
        return (
            f"a slot takes the ranks {took} ms: with {list(after.counts)} slots a step takes "
            f"{after.step_s * 1e3:.3g} ms, with {list(before.counts)} it takes "
            f"{before.step_s * 1e3:.3g} ms"
        )
