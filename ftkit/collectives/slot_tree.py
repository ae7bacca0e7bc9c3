"""SlotTree: sums gradients slot by slot in the order of the canonical tree, in place."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ftkit.collectives.slots import Subtree, leaf, parent, siblings


@dataclass(frozen=True, slots=True)
class SlotNode:
    """The value of one node: a flat contiguous CPU tensor."""

    node: Subtree
    value: torch.Tensor


class SlotTree:
    """One rank's accumulator over its slots; at most log2(slots) + 1 buffers are alive.

    Slots are pushed in rising order, each once. As soon as two siblings are there, the right
    one is added into the left one's buffer and its own is kept for reuse: `spare()` hands it
    out, so that after the first step nothing is allocated. Not thread-safe.
    """

    def __init__(self, slots: int) -> None:
        """A tree over `slots` slots. Raises ValueError when there is none."""
        if slots < 1:
            raise ValueError(f"a tree needs at least one slot, got {slots}")
        self._slots = slots
        self._stack: list[SlotNode] = []
        self._free: list[torch.Tensor] = []

    @property
    def nodes(self) -> Sequence[SlotNode]:
        """What `reduce_slots` is given: maximal nodes, from left to right."""
        return tuple(self._stack)

    def push(self, slot: int, value: torch.Tensor) -> None:
        """Take over `value`, the flat gradient of `slot`, and merge what can be merged.

        The buffer belongs to the tree from here on and is changed in place.

        Raises:
          ValueError: the slot is out of order, or the shape or dtype differs.
        """
        node = leaf(slot, self._slots)
        if value.dim() != 1 or not value.is_contiguous():
            raise ValueError("a slot's value must be a flat, contiguous tensor")
        if self._stack:
            last = self._stack[-1]
            if slot < last.node.first + min(1 << last.node.level, self._slots):
                raise ValueError(f"slot {slot} is covered already; push slots in rising order")
            if value.shape != last.value.shape or value.dtype != last.value.dtype:
                raise ValueError(
                    f"slot {slot} has {value.numel()} x {value.dtype}, the slots before it "
                    f"{last.value.numel()} x {last.value.dtype}"
                )
        self._stack.append(SlotNode(node, value))
        while len(self._stack) >= 2 and siblings(self._stack[-2].node, self._stack[-1].node):
            right = self._stack.pop()
            left = self._stack.pop()
            left.value.add_(right.value)
            self._free.append(right.value)
            self._stack.append(SlotNode(parent(left.node, self._slots), left.value))

    def spare(self) -> torch.Tensor | None:
        """A buffer to fill for the next push, or None when none is free yet."""
        return self._free.pop() if self._free else None

    def clear(self) -> None:
        """Forget the values, keep their buffers: ready for the next step."""
        self._free.extend(n.value for n in self._stack)
        self._stack.clear()
