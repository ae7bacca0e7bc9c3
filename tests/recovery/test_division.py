"""Which slots each rank plays: what it brings into a world, and how fast it is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftkit.core.errors import ProtocolError
from ftkit.core.ids import Slot, Step
from ftkit.recovery.division import STEPS, Balance, Brought, better, first_division, rest_of
from ftkit.recovery.rebalance import Speed, evenly


def even(slots: int, ranks: int) -> Balance:
    return Balance(slots, evenly(slots, [Speed(slot_s=1.0)] * ranks))


def test_a_rank_of_half_the_speed_gets_half_the_slots() -> None:
    balance = even(14, 4)
    said = [balance.hear([0.1, 0.2, 0.1, 0.1]) for _ in range(STEPS)]
    assert said[:-1] == [""] * (STEPS - 1)
    assert balance.division.counts == (4, 2, 4, 4)
    assert "[4, 2, 4, 4]" in said[-1]
    # 4 slots at 0.2 s before, 4 at 0.1 s now.
    assert balance.division.step_s == pytest.approx(0.4)


def test_noise_moves_nobody_s_slots() -> None:
    balance = even(16, 4)
    for step in range(10 * STEPS):
        assert not balance.hear([0.1 + 0.01 * ((step + rank) % 3) for rank in range(4)])
    assert balance.division.counts == (4, 4, 4, 4)


def test_a_rank_that_was_slow_for_one_step_keeps_its_slots() -> None:
    balance = even(16, 4)
    for step in range(STEPS):
        assert not balance.hear([0.1, 5.0 if step == 3 else 0.1, 0.1, 0.1])
    assert balance.division.counts == (4, 4, 4, 4)


def test_who_has_recovered_gets_its_slots_back() -> None:
    balance = even(14, 4)
    for _ in range(STEPS):
        balance.hear([0.1, 0.3, 0.1, 0.1])
    assert balance.division.counts[1] < 3
    for _ in range(STEPS):
        balance.hear([0.1, 0.1, 0.1, 0.1])
    assert sorted(balance.division.counts) == [3, 3, 4, 4]


def test_a_rank_that_tells_nothing_changes_nothing() -> None:
    balance = even(8, 2)
    assert not any(balance.hear([0.1, 0.0]) for _ in range(3 * STEPS))


def test_the_slowest_rank_still_plays_one() -> None:
    """Or nobody would know when it is fast again."""
    now = evenly(8, [Speed(slot_s=1.0)] * 2)
    assert better(8, now, [0.01, 1.0]).counts == (7, 1)


def test_a_world_begins_evenly_unless_every_rank_knows_its_speed() -> None:
    fast, slow = Brought(slot_s=0.1), Brought(slot_s=0.2)
    assert first_division(6, [fast, slow]).counts == (4, 2)
    assert first_division(6, [fast, Brought()]).counts == (3, 3)


@given(st.lists(st.floats(0.001, 1.0), min_size=1, max_size=6), st.integers(0, 20))
def test_a_better_division_is_never_slower_and_has_every_slot(
    slot_s: list[float], more: int
) -> None:
    slots = len(slot_s) + more
    speeds = [Speed(slot_s=s) for s in slot_s]
    found = better(slots, evenly(slots, speeds), slot_s)
    assert found.step_s <= evenly(slots, speeds).step_s
    assert [s for held in found.slots for s in held] == list(range(slots))
    assert min(found.counts) >= 1


def brought(step: int, kept: list[int], begun: list[int] = []) -> Brought:  # noqa: B006
    return Brought(step=Step(step), kept=tuple(map(Slot, kept)), begun=tuple(map(Slot, begun)))


def test_survivors_play_the_slots_of_the_dead_and_their_own_rest() -> None:
    rest = rest_of(Step(5), [brought(5, [0, 1], [2]), brought(5, [6, 7])], 8)
    assert rest is not None
    assert rest.kept == ((0, 1), (6, 7))
    assert 2 in rest.todo[0]
    assert sorted(rest.todo[0] + rest.todo[1]) == [2, 3, 4, 5]


def test_sums_of_another_step_are_worth_nothing() -> None:
    rest = rest_of(Step(5), [brought(4, [0, 1]), brought(5, [2])], 4)
    assert rest is not None
    assert rest.kept == ((), (2,))
    assert rest_of(Step(5), [brought(4, [0, 1]), brought(5, [], [2])], 4) is None


def test_two_that_claim_one_slot_begin_anew() -> None:
    assert rest_of(Step(1), [brought(1, [0]), brought(1, [0, 1])], 2) is None
    assert rest_of(Step(1), [brought(1, [0, 9])], 2) is None


def test_what_is_brought_survives_the_wire() -> None:
    mine = Brought(step=Step(7), kept=(Slot(1), Slot(3)), begun=(Slot(4),), slot_s=0.125)
    assert Brought.unpack(mine.pack()) == mine
    for wrong in (b"", b"{}", b"[1, 2, 3, 4]", b"[1, [], []]"):
        with pytest.raises(ProtocolError):
            Brought.unpack(wrong)
