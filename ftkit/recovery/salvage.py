"""Salvage: which slots of a broken step must be played again, and by whom. Pure.

The gradient of the step is a sum over slots along one fixed tree (`collectives.slots`), so what a
survivor has summed of *its* slots is worth as much after the loss as before: only the slots of the
dead, and those that nobody had begun, are left to do. They go to those who have the least left,
so a loss in mid-accumulation costs the dead rank's slots and not the step.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ftkit.core.ids import Slot


@dataclass(frozen=True, slots=True, kw_only=True)
class Salvage:
    """How the step goes on. By rank."""

    kept: tuple[tuple[Slot, ...], ...]
    """Slots whose gradients each holds already."""
    todo: tuple[tuple[Slot, ...], ...]
    """Slots each has still to play, rising."""

    @property
    def held(self) -> tuple[tuple[Slot, ...], ...]:
        """The slots of each rank's sum once the step is played, rising."""
        return tuple(tuple(sorted((*k, *t))) for k, t in zip(self.kept, self.todo, strict=True))

    @property
    def share(self) -> float:
        """The share of the step that need not be played again."""
        kept = sum(map(len, self.kept))
        total = kept + sum(map(len, self.todo))
        return kept / total if total else 0.0


def salvage(slots: int, kept: Sequence[Sequence[Slot]], begun: Sequence[Sequence[Slot]]) -> Salvage:
    """Plan the rest of a step that lost ranks in mid-accumulation.

    Args:
      slots: of the global batch.
      kept: what each rank of the world that goes on has finished.
      begun: what each has summed in part, and so must finish itself.

    Raises:
      ValueError: nobody goes on, or a slot is claimed twice, or is none of the step.
    """
    if not kept:
        raise ValueError("a step cannot go on with nobody")
    claimed = [s for mine in (*kept, *begun) for s in mine]
    if len(set(claimed)) < len(claimed) or not set(claimed) <= set(range(slots)):
        raise ValueError(f"slots {sorted(claimed)} are not each one of {slots}, claimed once")
    todo = [list(mine) for mine in begun]
    for slot in sorted(set(range(slots)) - set(claimed)):
        least = min(range(len(todo)), key=lambda r: (len(todo[r]), len(kept[r]), r))
        todo[least].append(Slot(slot))
    return Salvage(
        kept=tuple(tuple(sorted(mine)) for mine in kept),
        todo=tuple(tuple(sorted(mine)) for mine in todo),
    )
