"""A loss in mid-accumulation costs the dead rank's slots, not the step."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftkit.core.ids import Seat, Slot
from ftkit.recovery.salvage import salvage


def division(slots: int, seats: int) -> dict[Seat, list[Slot]]:
    return {
        Seat(r): [Slot(s) for s in range(r * slots // seats, (r + 1) * slots // seats)]
        for r in range(seats)
    }


def test_sixteen_slots_on_four_ranks_lose_four_and_not_sixteen() -> None:
    held = division(16, 4)
    done = {Seat(s): 3 for s in range(4)}
    plan = salvage(16, held, done, [Seat(0), Seat(2), Seat(3)])
    assert plan.again == (4, 5, 6)
    # 12 slots were played, 9 of them count; 4 + 3 are left, and 16 + 3 passes are made in all.
    assert sum(map(len, plan.todo.values())) == 7
    assert plan.share == pytest.approx(9 / 16)
    assert plan.todo == {0: (3, 4, 7), 2: (5, 11), 3: (6, 15)}


@given(st.integers(1, 40), st.integers(2, 6), st.data())
def test_every_slot_is_kept_or_played_once_and_nobody_does_much_more(
    slots: int, seats: int, data: st.DataObject
) -> None:
    held = division(slots, seats)
    done = {s: data.draw(st.integers(0, len(mine))) for s, mine in held.items()}
    survivors = sorted(data.draw(st.sets(st.sampled_from(sorted(held)), min_size=1)))
    plan = salvage(slots, held, done, survivors)
    every = [s for part in (plan.kept, plan.todo) for mine in part.values() for s in mine]
    assert sorted(every) == list(range(slots))
    for seat in survivors:
        assert set(held[seat]) <= set(plan.kept[seat]) | set(plan.todo[seat]), "nobody gives away"
    given_away = {s for seat in survivors for s in plan.todo[seat]} - {
        s for seat in survivors for s in held[seat]
    }
    left = {s: len(plan.todo[s]) for s in survivors}
    takers = [s for s in survivors if set(plan.todo[s]) & given_away]
    if takers:
        assert max(left[s] for s in takers) - min(left.values()) <= 1


def test_nonsense_is_refused() -> None:
    held = division(4, 2)
    with pytest.raises(ValueError, match="nobody"):
        salvage(4, held, {}, [])
    with pytest.raises(ValueError, match="not each held"):
        salvage(5, held, {}, [Seat(0)])
    with pytest.raises(ValueError, match="more slots than it holds"):
        salvage(4, held, {Seat(0): 3}, [Seat(0)])
