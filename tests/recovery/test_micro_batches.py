"""Micro-batches of any size: every sample once, no more at once than fits, as few as can be."""

from itertools import chain
from math import ceil

from hypothesis import given
from hypothesis import strategies as st

from ftkit.core.ids import Slot
from ftkit.recovery.micro_batches import rounds, together


@given(st.sets(st.integers(0, 60)), st.integers(1, 9))
def test_a_ranks_slots_are_played_each_once_with_their_neighbours(
    slots: set[int], most: int
) -> None:
    held = sorted(map(Slot, slots))
    groups = together(held, most)
    assert list(chain(*groups)) == held
    for group in groups:
        assert 1 <= len(group) <= most
        assert group == tuple(range(group[0], group[0] + len(group)))


def test_groups_are_as_few_and_as_equal_as_can_be() -> None:
    assert [len(g) for g in together([Slot(s) for s in range(9)], 4)] == [3, 3, 3]
    assert [len(g) for g in together([Slot(s) for s in range(7)], 4)] == [4, 3]
    assert together([Slot(s) for s in (0, 1, 5)], 4) == [(0, 1), (5,)]


@given(st.integers(1, 8), st.integers(0, 40), st.integers(1, 9))
def test_all_ranks_play_equally_many_rounds_and_together_each_slot_once(
    ranks: int, more: int, most: int
) -> None:
    slots = ranks + more
    played = [rounds(slots, ranks, rank, most) for rank in range(ranks)]
    assert len({len(p) for p in played}) == 1
    assert list(chain(*(chain(*p) for p in played))) == list(range(slots))
    assert len(played[0]) == ceil(ceil(slots / ranks) / most), "as few as the largest share takes"
    # Who plays along has read something before.
    assert all(p[0] and len(g) <= most for p in played for g in p)
