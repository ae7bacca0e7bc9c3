r"""The canonical sum: one fixed binary tree over the slots, whoever holds them. Pure.

Node (level, index) covers slots [index * 2**level, (index + 1) * 2**level) that exist. Its
value is left child + right child, or the left child alone where the right one covers no
slot. Each rank holds some of the slots, by default a contiguous range, sums the maximal subtrees
of them, and an owner folds everybody's nodes. Because every addition made is an addition of that one
tree, the bits of the sum do not depend on how many ranks there were.

    slots   0   1   2   3   4          W = 2: rank 0 holds 0,1     -> node (1,0)
             \ /     \ /    |                 rank 1 holds 2,3,4   -> nodes (1,1), (2,1)
            (1,0)   (1,1)   |          fold: ((1,0) + (1,1)) + (2,1)
                \   /       |
                (2,0)     (2,1)        node (2,1) is slot 4 alone: its right side is empty
                    \     /
                     (3,0)
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

#: The slots of each rank, in order of ranks.
Held = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True, order=True)
class Subtree:
    """A node of the tree, named by the highest level at which its value stays the same."""

    level: int
    index: int

    @property
    def first(self) -> int:
        """The first slot it covers."""
        return self.index << self.level


@dataclass(frozen=True, slots=True)
class Take:
    """Fold step: push the value of `node`, the `position`-th that `rank` contributes."""

    rank: int
    position: int
    node: Subtree


@dataclass(frozen=True, slots=True)
class Add:
    """Fold step: replace the two topmost values by their sum, left + right."""


def leaf(slot: int, slots: int) -> Subtree:
    """The node of one slot. Raises ValueError for a slot that does not exist."""
    if not 0 <= slot < slots:
        raise ValueError(f"slot {slot} does not exist among {slots} slots")
    return promote(Subtree(0, slot), slots)


def promote(node: Subtree, slots: int) -> Subtree:
    """The same value under its highest name: past every empty right side."""
    level, index = node.level, node.index
    while index and index % 2 == 0 and (index + 1) << level >= slots:
        level, index = level + 1, index // 2
    return Subtree(level, index)


def siblings(left: Subtree, right: Subtree) -> bool:
    """Whether the two are the children of one node, in this order."""
    return left.level == right.level and left.index % 2 == 0 and right.index == left.index + 1


def parent(node: Subtree, slots: int) -> Subtree:
    """The node above, under its highest name."""
    return promote(Subtree(node.level + 1, node.index // 2), slots)


def assign(slots: int, world_size: int) -> list[range]:
    """Which slots each rank holds: contiguous, even within one.

    Raises:
      ValueError: there is no slot, or no rank. More ranks than slots is allowed: the
        surplus hold none.
    """
    if slots < 1 or world_size < 1:
        raise ValueError(f"cannot assign {slots} slots to {world_size} ranks")
    return [
        range(r * slots // world_size, (r + 1) * slots // world_size) for r in range(world_size)
    ]


def nodes_of(held: range, slots: int) -> list[Subtree]:
    """The maximal aligned subtrees that exactly cover `held`, from left to right."""
    nodes: list[Subtree] = []
    at = held.start
    while at < held.stop:
        level = 0
        while True:
            size = 2 << level
            if at % size or min(at + size, slots) > held.stop or size >= 2 * slots:
                break
            level += 1
        nodes.append(promote(Subtree(level, at >> level), slots))
        at = min(at + (1 << level), slots)
    return nodes


def nodes_among(held: Iterable[int], slots: int) -> list[Subtree]:
    """As `nodes_of` for any slots, each once, whatever their order."""
    nodes = [leaf(slot, slots) for slot in sorted(held)]
    at = 0
    while at + 1 < len(nodes):
        if siblings(nodes[at], nodes[at + 1]):
            nodes[at : at + 2] = [parent(nodes[at], slots)]
            at = max(0, at - 1)
        else:
            at += 1
    return nodes


@lru_cache(maxsize=256)
def fold_plan(slots: int, world_size: int, division: Held | None = None) -> tuple[Take | Add, ...]:
    """How an owner combines all ranks' nodes: a postfix program over a stack of values.

    Ends with exactly one value on the stack, the canonical sum.

    Args:
      slots: of the global batch.
      world_size: ranks.
      division: the slots of each; None for `assign`.

    Raises:
      ValueError: the division does not have every slot once.
    """
    if division is None:
        held = [nodes_of(part, slots) for part in assign(slots, world_size)]
    else:
        held = [nodes_among(part, slots) for part in division]
    return plan_of(held, slots)


def plan_of(held: Sequence[Sequence[Subtree]], slots: int) -> tuple[Take | Add, ...]:
    """`fold_plan` for any division of the slots, given each rank's nodes in order.

    Raises:
      ValueError: the nodes do not cover every slot exactly once.
    """
    takes = sorted(
        (
            Take(rank, position, node)
            for rank, nodes in enumerate(held)
            for position, node in enumerate(nodes)
        ),
        key=lambda take: take.node.first,
    )
    program: list[Take | Add] = []
    stack: list[Subtree] = []
    for take in takes:
        program.append(take)
        stack.append(take.node)
        while len(stack) >= 2 and siblings(stack[-2], stack[-1]):
            stack.pop()
            stack.append(parent(stack.pop(), slots))
            program.append(Add())
    if len(stack) != 1 or stack[0].first != 0 or 1 << stack[0].level < slots:
        raise ValueError(f"nodes {[t.node for t in takes]} do not cover {slots} slots once")
    return tuple(program)
