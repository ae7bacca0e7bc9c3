"""Salvage: which slots of a broken step must be played again, and by whom. Pure.

The gradient of the step is a sum over slots along one fixed tree (`collectives.slots`), so what a
survivor has summed of *its* slots is worth as much after the loss as before: only the slots of the
dead, and those that nobody had begun, are left to do. They go to those who have the least left,
so a loss in mid-accumulation costs the dead rank's slots and not the step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ftkit.core.ids import Seat, Slot


@dataclass(frozen=True, slots=True, kw_only=True)
class Salvage:
    """How the step goes on."""

    kept: Mapping[Seat, tuple[Slot, ...]]
    """Slots whose gradients each survivor holds already."""
    todo: Mapping[Seat, tuple[Slot, ...]]
    """Slots each survivor has still to play, rising."""
    again: tuple[Slot, ...]
    """Of these, the ones that were played before, and lost with their rank."""

    @property
    def share(self) -> float:
        """The share of the step that need not be played again."""
        kept = sum(map(len, self.kept.values()))
        total = kept + sum(map(len, self.todo.values()))
        return kept / total if total else 0.0


def salvage(
    slots: int,
    held: Mapping[Seat, Sequence[Slot]],
    done: Mapping[Seat, int],
    survivors: Sequence[Seat],
) -> Salvage:
    """Plan the rest of a step that lost ranks in mid-accumulation.

    Args:
      slots: of the global batch.
      held: the slots of each seat, in the order it plays them.
      done: how many of them each has finished. Those of the dead are lost all the same.
      survivors: who goes on.

    Raises:
      ValueError: nobody survives, or the slots are not each held once.
    """
    if not survivors:
        raise ValueError("a step cannot go on with nobody")
    if sorted(s for mine in held.values() for s in mine) != list(range(slots)):
        raise ValueError(f"{slots} slots are not each held by one seat: {dict(held)}")
    if any(not 0 <= done.get(seat, 0) <= len(mine) for seat, mine in held.items()):
        raise ValueError(f"nobody has finished more slots than it holds: {dict(done)}")
    kept = {s: tuple(held[s][: done.get(s, 0)]) for s in survivors}
    todo = {s: list(held[s][done.get(s, 0) :]) for s in survivors}
    gone = [seat for seat in held if seat not in todo]
    again = sorted(s for seat in gone for s in held[seat][: done.get(seat, 0)])
    for slot in sorted(s for seat in gone for s in held[seat]):
        least = min(survivors, key=lambda s: (len(todo[s]), len(kept[s]), s))
        todo[least].append(slot)
    return Salvage(
        kept=kept, todo={s: tuple(sorted(t)) for s, t in todo.items()}, again=tuple(again)
    )
