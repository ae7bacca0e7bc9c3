"""SlotTree: sums gradients slot by slot in the order of the canonical tree, in place."""

from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ftkit.collectives.slots import Subtree, leaf, parent, siblings


@dataclass(frozen=True, slots=True)
class SlotNode:
    """The value of one node: a flat contiguous tensor."""

    node: Subtree
    value: torch.Tensor


class SlotTree:
    """One rank's accumulator over its slots; at most log2(slots) + 1 buffers are alive.

    Slots are pushed each once; in rising order that is all that is alive, in another more. As soon
    as two siblings are there, the right one is added into the left one's buffer and its own is kept
    for reuse: `spare()` hands it out, so that after the first step nothing is allocated. Not
    thread-safe.
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
          ValueError: the slot is there already, or the shape or dtype differs.
        """
        node = leaf(slot, self._slots)
        if value.dim() != 1 or not value.is_contiguous():
            raise ValueError("a slot's value must be a flat, contiguous tensor")
        if slot in self:
            raise ValueError(f"slot {slot} is covered already; push each slot once")
        if self._stack:
            other = self._stack[-1].value
            if value.shape != other.shape or value.dtype != other.dtype:
                raise ValueError(
                    f"slot {slot} has {value.numel()} x {value.dtype}, the slots before it "
                    f"{other.numel()} x {other.dtype}"
                )
        at = bisect([n.node.first for n in self._stack], slot)
        self._stack.insert(at, SlotNode(node, value))
        while True:
            if at and siblings(self._stack[at - 1].node, self._stack[at].node):
                at -= 1
            elif at + 1 == len(self._stack) or not siblings(
                self._stack[at].node, self._stack[at + 1].node
            ):
                return
            left, right = self._stack[at], self._stack.pop(at + 1)
            left.value.add_(right.value)
            self._free.append(right.value)
            self._stack[at] = SlotNode(parent(left.node, self._slots), left.value)

    def __contains__(self, slot: int) -> bool:
        """Whether `slot` has been pushed."""
        return any(n.node.first <= slot < n.node.first + (1 << n.node.level) for n in self._stack)

    def take_back(self, buffer: torch.Tensor) -> None:
        """A buffer that `spare` gave, or one like it, is free again."""
        self._free.append(buffer)

    def spare(self) -> torch.Tensor | None:
        """A buffer to fill for the next push, or None when none is free yet."""
        return self._free.pop() if self._free else None

    def clear(self) -> None:
        """Forget the values, keep their buffers: ready for the next step."""
        self._free.extend(n.value for n in self._stack)
        self._stack.clear()
