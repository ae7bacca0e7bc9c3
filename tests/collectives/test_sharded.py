"""Sharded gradients: rows of any number of ranks make up one sum, and a norm has no order."""

# mypy: allow-untyped-calls

import math
from typing import Any

import pytest
import torch

from ftkit.collectives.norm import clip_factor, norm_of
from ftkit.collectives.sharded import ShardedReducer, assign_rounds, rounds_of
from ftkit.collectives.sharded_unit import AHEAD, Unit
from ftkit.collectives.slot_tree import SlotTree
from ftkit.collectives.slots import Take, fold_plan
from ftkit.core.errors import GenerationAborted, UsageError

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
        unit = Unit(memory, [], slots=slots, world_size=size, rank=0)  # type: ignore[arg-type]
        for attempt in range(3):
            unit.forget()
            rounds = rounds_of(slots, size)
            if attempt == 1:  # cut short: what it left is not in the next sum
                play(unit, memory, leaves, size, rounds - 1)
                continue
            total = play(unit, memory, leaves, size, rounds)
            assert torch.equal(total, expected), (slots, size, attempt)


def test_a_unit_with_other_gradients_in_another_slot_is_refused() -> None:
    unit = Unit(Memory(), [], slots=3, world_size=1, rank=0)  # type: ignore[arg-type]
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


@pytest.mark.parametrize(
    ("dtype", "unit"),
    [(torch.float32, 2.0**-140), (torch.float32, 2.0**120), (torch.float64, 2.0**-1060)],
)
def test_the_smallest_and_largest_numbers_have_a_norm(dtype: torch.dtype, unit: float) -> None:
    assert norm_of([torch.tensor([3 * unit, 4 * unit], dtype=dtype)]) == 5 * unit


def test_clipping_shortens_and_never_lengthens() -> None:
    assert clip_factor(10.0, 1.0) == pytest.approx(0.1)
    assert clip_factor(0.5, 1.0) == 1.0
    assert clip_factor(0.0, 1.0) == 1.0
    assert clip_factor(math.inf, 1.0) == 0.0


class Rank:
    """A reducer of a rank whose exchanges end when somebody waits for them."""

    def __init__(self, size: int, slots: int, units: int) -> None:
        self.log: list[str] = []
        self.reducer = ShardedReducer(
            [], slots=slots, world_size=size, rank=0, exchange=self.exchange, mean=False
        )
        made = [
            Unit(self.reducer, [torch.zeros(1)], slots=slots, world_size=size, rank=0)
            for _ in range(units)
        ]
        self.reducer._units = made
        self.units = made
        self.fails = False

    def exchange(self, out: torch.Tensor, rows: torch.Tensor, *, last: bool) -> Any:
        number = len(self.log)
        self.log.append(f"start {number}" + " last" * last)
        out.fill_(math.nan)

        class Started:
            def wait(_) -> None:  # noqa: N805
                self.log.append(f"wait {number}")
                if self.fails:
                    raise GenerationAborted("cut")
                # Every rank has given what we gave.
                out.copy_(rows.view(self.reducer._size, -1)[0].repeat(self.reducer._size))

        return Started()

    def backward(self, slot: int, values: list[float], *, last: bool) -> list[torch.Tensor]:
        self.reducer.start_slot(slot, last=last)
        outs = [torch.full((LENGTH,), math.nan) for _ in values]
        for unit, out, value in zip(reversed(self.units), outs, values, strict=True):
            size = self.reducer._size
            unit(out, torch.full((size * LENGTH,), value), Group(size), None)
        return outs


class Group:
    def __init__(self, size: int) -> None:
        self._size = size

    def size(self) -> int:
        return self._size


def test_a_backward_pass_waits_for_the_exchange_before_the_last_and_outputs_come_at_the_end() -> (
    None
):
    rank = Rank(size=2, slots=4, units=3)
    first = rank.backward(0, [1.0, 2.0, 3.0], last=False)
    assert all(out.eq(0).all() for out in first), "FSDP2 may add them up"
    starts = [i for i, said in enumerate(rank.log) if said.startswith("start")]
    assert rank.log[: starts[AHEAD - 1] + 1] == ["start 0", "start 1"], "nobody waited"
    second = rank.backward(2, [1.0, 2.0, 3.0], last=True)
    assert second[-1].eq(0).all(), "on its way"
    rank.reducer.finish(held=2)
    for out, value in zip(second, (1.0, 2.0, 3.0), strict=True):
        assert out.eq(4 * value).all()


def test_an_exchange_that_was_cut_is_told_at_the_end_and_nothing_of_it_is_in_the_next_attempt() -> (
    None
):
    rank = Rank(size=2, slots=2, units=2)
    rank.backward(0, [1.0, 2.0], last=True)
    rank.fails = True
    with pytest.raises(GenerationAborted):
        rank.reducer.finish(held=1)
    rank.fails = False
    rank.reducer.begin()
    outs = rank.backward(0, [5.0, 6.0], last=True)
    rank.reducer.finish(held=1)
    assert [float(out[0]) for out in outs] == [10.0, 12.0]


def test_where_fsdp_takes_no_view_the_pass_waits() -> None:
    rank = Rank(size=2, slots=2, units=1)
    rank.units[0].params = [torch.zeros(1, dtype=torch.float64)]
    (out,) = rank.backward(0, [1.0], last=True)
    assert out.eq(2.0).all()
