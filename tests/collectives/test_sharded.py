"""Sharded gradients: rows of any number of ranks make up one sum, and a norm has no order."""

# mypy: allow-untyped-calls

import math
from typing import Any

import pytest
import torch

from ftkit.collectives.norm import clip_factor, norm_of
from ftkit.collectives.sharded import _Unit, assign_rounds, rounds_of
from ftkit.collectives.slot_tree import SlotTree
from ftkit.collectives.slots import Take, fold_plan
from ftkit.core.errors import UsageError

LENGTH = 6


class Memory:
    """The part of a reducer that a unit needs: one buffer for all rows, used again and again."""

    def __init__(self) -> None:
        self.kept = torch.full((64,), math.nan)

    def scratch(self, use: str, numel: int, like: torch.Tensor) -> torch.Tensor:
        self.kept.fill_(math.nan)  # nobody may count on what was there
        return self.kept[:numel]


def canonical(leaves: list[torch.Tensor]) -> torch.Tensor:
    tree, slots = SlotTree(len(leaves)), len(leaves)
    for slot, leaf in enumerate(leaves):
        tree.push(slot, leaf.clone())
    stack: list[torch.Tensor] = []
    for step in fold_plan(slots, 1):
        if isinstance(step, Take):
            stack.append(tree.nodes[step.position].value.clone())
        else:
            right, left = stack.pop(), stack.pop()
            stack.append(left + right)
    return stack[0]


def play(unit: Any, memory: Memory, leaves: list[torch.Tensor], size: int, rounds: int) -> Any:
    total = None
    for j in range(rounds):
        rows = memory.scratch("came", size * LENGTH, leaves[0]).view(size, LENGTH)
        for rank in range(size):
            slot = assign_rounds(len(leaves), size, rank)[j]
            if slot < len(leaves):  # the row of a rank without a slot is anything
                rows[rank] = leaves[slot]
        total = unit._push(rows)
    return total


@pytest.mark.parametrize("slots", [1, 2, 3, 5, 7, 8, 12])
def test_the_sum_is_the_same_for_any_number_of_ranks(slots: int) -> None:
    torch.manual_seed(slots)
    leaves = [torch.randn(LENGTH) for _ in range(slots)]
    expected = canonical(leaves)
    for size in range(1, min(slots, 8) + 1):
        memory = Memory()
        unit = _Unit(memory, [], slots=slots, world_size=size, rank=0)  # type: ignore[arg-type]
        for attempt in range(3):
            unit.forget()
            rounds = rounds_of(slots, size)
            if attempt == 1:  # cut short: what it left is not in the next sum
                play(unit, memory, leaves, size, rounds - 1)
                continue
            total = play(unit, memory, leaves, size, rounds)
            assert torch.equal(total, expected), (slots, size, attempt)


def test_a_unit_with_other_gradients_in_another_slot_is_refused() -> None:
    unit = _Unit(Memory(), [], slots=3, world_size=1, rank=0)  # type: ignore[arg-type]
    unit._push(torch.ones(1, 4))
    with pytest.raises(UsageError, match="4 gradients in one slot and 5 in another"):
        unit._push(torch.ones(1, 5))


def test_all_ranks_together_play_every_slot_once() -> None:
    for slots in range(1, 20):
        for size in range(1, slots + 1):
            played = [assign_rounds(slots, size, rank) for rank in range(size)]
            assert len({len(p) for p in played}) == 1, "their passes need each other"
            assert sorted(s for p in played for s in p if s < slots) == list(range(slots))


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_a_norm_does_not_depend_on_the_cut(scale: float) -> None:
    torch.manual_seed(0)
    vector = torch.randn(10_000) * scale
    whole = norm_of([vector])
    assert whole == pytest.approx(float(vector.double().norm()), rel=1e-9)
    for size in (1, 7, 4096):
        assert norm_of(reversed(vector.split(size))) == whole


def test_ranks_and_replicas_come_to_the_norm_of_one() -> None:
    torch.manual_seed(1)
    parts = list(torch.randn(3, 1000))
    largest = max(float(p.abs().max()) for p in parts)
    told: list[list[bytes]] = []
    for part in parts:  # what each says in the two rounds, given the others' first word
        words: list[bytes] = []

        def swap(mine: bytes, words: list[bytes] = words) -> list[bytes]:
            words.append(mine)
            return [largest.hex().encode()] if len(words) == 1 else [mine]

        norm_of([part], swap)
        told.append(words)

    def all_of_them(mine: bytes) -> list[bytes]:
        return [w[0] if mine in [x[0] for x in told] else w[1] for w in told] * 2

    assert norm_of([parts[0]], all_of_them, replicas=2) == norm_of(parts)


def test_what_is_not_finite_stays_so_and_nothing_is_nothing() -> None:
    assert norm_of([torch.tensor([1.0, math.inf])]) == math.inf
    assert not math.isfinite(norm_of([torch.tensor([1.0, math.nan])]))
    assert norm_of([torch.zeros(3), torch.empty(0)]) == 0.0
    assert norm_of([]) == 0.0


def test_clipping_shortens_and_never_lengthens() -> None:
    assert clip_factor(10.0, 1.0) == pytest.approx(0.1)
    assert clip_factor(0.5, 1.0) == 1.0
    assert clip_factor(0.0, 1.0) == 1.0
    assert clip_factor(math.inf, 1.0) == 0.0
