"""RunningSum: one rank's sum of gradients, in the order in which they come."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from ftkit.collectives.slot_tree import SlotNode
from ftkit.collectives.slots import leaf
from ftkit.core.ids import Slot


class RunningSum:
    """As a `SlotTree`, where the order of the sum need not be the same in every world.

    One buffer is alive besides the one being filled. Not thread-safe.
    """

    def __init__(self) -> None:
        """Nothing is summed yet."""
        self._sum: torch.Tensor | None = None
        self._pushed: set[int] = set()
        self._free: list[torch.Tensor] = []

    @property
    def nodes(self) -> Sequence[SlotNode]:
        """The sum, as the only slot of a tree of its own; for `by_rank`."""
        return () if self._sum is None else (SlotNode(leaf(0, 1), self._sum),)

    def push(self, slot: int, value: torch.Tensor) -> None:
        """Take over `value` and add it. Raises ValueError when `slot` is there already."""
        if slot in self._pushed:
            raise ValueError(f"slot {slot} is summed already; push each slot once")
        self._pushed.add(slot)
        if self._sum is None:
            self._sum = value
        else:
            self._sum.add_(value)
            self._free.append(value)

    def __contains__(self, slot: int) -> bool:
        """Whether `slot` has been pushed."""
        return slot in self._pushed

    def take_back(self, buffer: torch.Tensor) -> None:
        """A buffer that `spare` gave, or one like it, is free again."""
        self._free.append(buffer)

    def spare(self) -> torch.Tensor | None:
        """A buffer to fill for the next push, or None when none is free yet."""
        return self._free.pop() if self._free else None

    def clear(self) -> None:
        """Forget the sum, keep its buffer."""
        if self._sum is not None:
            self._free.append(self._sum)
        self._sum = None
        self._pushed.clear()


def by_rank(
    nodes: Sequence[SlotNode], held: Sequence[Sequence[Slot]], rank: int
) -> tuple[list[SlotNode], tuple[tuple[Slot, ...], ...]]:
    """What `reduce_slots` is given to add the sums of ranks, in the order of ranks.

    Args:
      nodes: of this rank's `RunningSum`.
      held: the slots of every rank; one without any adds nothing.
      rank: this one.

    Returns:
      This rank's nodes, and the division: one slot for each rank that holds any.
    """
    adding = [r for r, slots in enumerate(held) if slots]
    division = tuple((Slot(adding.index(r)),) if r in adding else () for r in range(len(held)))
    if not nodes or rank not in adding:
        return [], division
    return [replace(nodes[0], node=leaf(adding.index(rank), len(adding)))], division
