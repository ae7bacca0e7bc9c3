"""A loss in mid-accumulation costs the dead rank's slots, not the step."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftkit.core.ids import Slot
from ftkit.recovery.salvage import salvage


def slots_of(*numbers: int) -> list[Slot]:
    return [Slot(n) for n in numbers]


def test_sixteen_slots_on_four_ranks_lose_four_and_not_sixteen() -> None:
    """Each has played three of its four when rank 1, which held 4 to 7, dies."""
    plan = salvage(16, [slots_of(0, 1, 2), slots_of(8, 9, 10), slots_of(12, 13, 14)], [[], [], []])
    # 12 slots were played, 9 of them count; 4 + 3 are left, and 16 + 3 passes are made in all.
    assert sum(map(len, plan.todo)) == 7
    assert max(map(len, plan.todo)) == 3
    assert plan.share == pytest.approx(9 / 16)
    assert sorted(s for mine in plan.held for s in mine) == list(range(16))


def test_what_a_rank_has_summed_in_part_stays_its_own() -> None:
    plan = salvage(4, [[], slots_of(2)], [slots_of(3), []])
    assert plan.todo == ((1, 3), (0,))


@given(st.integers(1, 40), st.integers(1, 6), st.data())
def test_every_slot_is_kept_or_played_once_and_nobody_does_much_more(
    slots: int, size: int, data: st.DataObject
) -> None:
    owner = data.draw(st.lists(st.integers(-1, size - 1), min_size=slots, max_size=slots))
    begun: list[list[Slot]] = [[] for _ in range(size)]
    kept = [[Slot(s) for s in range(slots) if owner[s] == r] for r in range(size)]
    for rank in range(size):
        if data.draw(st.booleans()) and kept[rank]:
            begun[rank] = [kept[rank].pop()]
    plan = salvage(slots, kept, begun)
    assert sorted(s for mine in plan.held for s in mine) == list(range(slots))
    assert [set(b) <= set(t) for b, t in zip(begun, plan.todo, strict=True)] == [True] * size
    left = [len(mine) for mine in plan.todo]
    assert max(left) - min(left) <= 1


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="nobody"):
        salvage(4, [], [])
    with pytest.raises(ValueError, match="claimed once"):
        salvage(4, [slots_of(1), slots_of(1)], [[], []])
    with pytest.raises(ValueError, match="claimed once"):
        salvage(4, [slots_of(4)], [[]])
