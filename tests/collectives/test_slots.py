"""The canonical tree: one expression, whoever holds which slots."""

# mypy: allow-untyped-calls

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ftkit.collectives.slot_tree import SlotTree
from ftkit.collectives.slots import (
    Add,
    Take,
    assign,
    fold_plan,
    nodes_among,
    nodes_of,
    plan_of,
)


def expression(low, high):
    """The tree written by its definition: split at the largest power of two below."""
    if high - low == 1:
        return low
    half = 1
    while half * 2 < high - low:
        half *= 2
    return (expression(low, low + half), expression(low + half, high))


def run(plan, value):
    stack = []
    for step in plan:
        if isinstance(step, Take):
            stack.append(value(step))
        else:
            assert isinstance(step, Add)
            right, left = stack.pop(), stack.pop()
            stack.append((left, right))
    (result,) = stack
    return result


def of_node(node, slots):
    return expression(node.first, min(node.first + (1 << node.level), slots))


@pytest.mark.parametrize("slots", range(1, 34))
def test_every_world_size_adds_up_the_same_expression(slots):
    for size in range(1, slots + 1):
        got = run(fold_plan(slots, size), lambda take: of_node(take.node, slots))
        assert got == expression(0, slots), f"{slots} slots on {size} ranks"


@given(st.integers(1, 33), st.data())
def test_any_contiguous_division_adds_up_the_same_expression(slots, data):
    cuts = data.draw(st.lists(st.integers(0, slots), max_size=6))
    limits = [0, *sorted(cuts), slots]
    held = [nodes_of(range(a, b), slots) for a, b in pairwise(limits)]
    assert run(plan_of(held, slots), lambda t: of_node(t.node, slots)) == expression(0, slots)


@given(st.integers(1, 100), st.integers(1, 100))
def test_every_slot_is_assigned_once_and_evenly(slots, size):
    parts = assign(slots, size)
    assert [s for part in parts for s in part] == list(range(slots))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_nodes_that_do_not_cover_all_are_refused():
    with pytest.raises(ValueError, match="do not cover"):
        plan_of([nodes_of(range(3), 8), nodes_of(range(4, 8), 8)], 8)


@given(st.integers(1, 20), st.data())
def test_the_accumulator_ends_with_the_nodes_of_its_range(slots, data):
    size = data.draw(st.integers(1, slots))
    for part in assign(slots, size):
        tree = SlotTree(slots)
        for slot in part:
            tree.push(slot, torch.full((3,), float(2**slot)))
        assert [n.node for n in tree.nodes] == nodes_of(part, slots)
        assert sum(n.value[0].item() for n in tree.nodes) == sum(2**s for s in part)


def test_a_second_step_allocates_nothing():
    tree = SlotTree(8)
    seen = set()
    for step in range(3):
        for slot in range(8):
            buffer = tree.spare()
            if buffer is None:
                assert step == 0
                buffer = torch.empty(4)
            seen.add(buffer.data_ptr())
            tree.push(slot, buffer.fill_(1.0))
        assert tree.nodes[0].value.tolist() == [8.0] * 4
        tree.clear()
    assert len(seen) <= 4


def test_a_slot_twice_or_of_another_shape_is_refused():
    tree = SlotTree(4)
    tree.push(1, torch.zeros(2))
    with pytest.raises(ValueError, match="covered already"):
        tree.push(1, torch.zeros(2))
    with pytest.raises(ValueError, match="slot 2 has"):
        tree.push(2, torch.zeros(3))
    with pytest.raises(ValueError, match="does not exist"):
        tree.push(4, torch.zeros(2))


@given(st.integers(1, 20), st.data())
def test_any_division_in_any_order_comes_to_the_same_bits(slots, data):
    """Values that floating point adds up differently in another order."""
    size = data.draw(st.integers(1, slots))
    owner = data.draw(st.lists(st.integers(0, size - 1), min_size=slots, max_size=slots))
    division = tuple(tuple(s for s in range(slots) if owner[s] == r) for r in range(size))
    leaves = [torch.tensor([1.0 / (3 + s), 1e8 / (1 + s * s)]) for s in range(slots)]
    brought = []
    for held in division:
        tree = SlotTree(slots)
        for slot in data.draw(st.permutations(held)):
            assert slot not in tree
            tree.push(slot, leaves[slot].clone())
            assert slot in tree
        assert [n.node for n in tree.nodes] == nodes_among(held, slots)
        brought.append(tree.nodes)
    stack = []
    for move in fold_plan(slots, size, division):
        if isinstance(move, Take):
            stack.append(brought[move.rank][move.position].value)
        else:
            right = stack.pop()
            stack.append(stack.pop() + right)
    whole = SlotTree(slots)
    for slot, value in enumerate(leaves):
        whole.push(slot, value.clone())
    assert torch.equal(stack[0], whole.nodes[0].value)


def test_a_division_must_have_every_slot_once():
    with pytest.raises(ValueError, match="do not cover"):
        fold_plan(4, 2, ((0, 1), (3,)))
    with pytest.raises(ValueError, match="do not cover"):
        fold_plan(4, 2, ((0, 1), (1, 2, 3)))
