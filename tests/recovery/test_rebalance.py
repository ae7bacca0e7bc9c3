"""Slots to the fast: least step, exact weights, every slot once."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftkit.recovery.rebalance import (
    Speed,
    evenly,
    whole_slots,
)

EQUAL = [Speed(slot_s=1.0)] * 4
HALF = [Speed(slot_s=1.0)] * 3 + [Speed(slot_s=2.0)]


def test_equal_ranks_get_even_shares() -> None:
    assert whole_slots(16, EQUAL).counts == (4, 4, 4, 4)
    assert sorted(whole_slots(18, EQUAL).counts) == [4, 4, 5, 5]


def test_a_rank_at_half_speed_gets_half_and_the_step_is_half_as_long_again_as_it_could_be() -> None:
    before, after = evenly(28, HALF), whole_slots(28, HALF)
    assert after.counts == (8, 8, 8, 4)
    assert before.step_s / after.step_s == pytest.approx(14 / 8)  # the goal is 1.3
    assert after.busy == 1.0


def test_uneven_worlds_keep_the_throughput_that_slots_allow() -> None:
    full, less = whole_slots(64, EQUAL), whole_slots(64, EQUAL[:3])
    assert less.counts == (22, 21, 21)
    assert full.step_s / less.step_s >= 0.95 * 3 / 4


def test_memory_is_a_limit_and_what_does_not_fit_is_refused() -> None:
    tight = [Speed(slot_s=0.1, slots_max=2), Speed(slot_s=1.0)]
    assert whole_slots(6, tight).counts == (2, 4)
    with pytest.raises(ValueError, match="memory for 5 of 6 slots"):
        whole_slots(6, [Speed(slot_s=1, slots_max=2), Speed(slot_s=1, slots_max=3)])


speeds = st.lists(
    st.builds(
        Speed,
        slot_s=st.floats(0.1, 10),
        fixed_s=st.floats(0, 5),
        slots_max=st.none() | st.integers(3, 6),
    ),
    min_size=2,
    max_size=4,
)


@given(st.integers(1, 6), speeds)
def test_no_division_is_faster_and_every_slot_is_held_once(slots: int, ranks: list[Speed]) -> None:
    found = whole_slots(slots, ranks)
    assert [s for held in found.slots for s in held] == list(range(slots))
    best = min(
        max(s.fixed_s + n * s.slot_s for n, s in zip(counts, ranks, strict=True) if n)
        for counts in itertools.product(range(slots + 1), repeat=len(ranks))
        if sum(counts) == slots
        and all(s.slots_max is None or n <= s.slots_max for n, s in zip(counts, ranks, strict=True))
    )
    slowest = max(s.fixed_s + n * s.slot_s for n, s in zip(found.counts, ranks, strict=True) if n)
    assert slowest == pytest.approx(best)


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="takes time"):
        Speed(slot_s=0)
