"""A loss moves nothing before training goes on, and the next one neither."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftkit.core.ids import Seat
from ftkit.recovery.virtual_blocks import (
    Placement,
    contiguous_shrink,
    declustered,
    placements,
    replicate,
    shrink,
)

worlds = st.integers(2, 9)


def world(count: int) -> Placement:
    return declustered(Seat(s) for s in range(count))


def held(placement: Placement, seat: Seat) -> set[int]:
    """The blocks whose bytes lie on `seat`."""
    standby = {b for b, s in placement.replica.items() if s == seat}
    return set(placement.owned(seat)) | standby


@given(worlds)
def test_every_rank_owns_as_many_and_leaves_one_to_each_other(count: int) -> None:
    placement = world(count)
    assert len(placement.owner) == count * (count - 1)
    for seat in placement.seats:
        mine = placement.owned(seat)
        assert len(mine) == count - 1
        others = {placement.replica[b] for b in mine}
        assert others == set(placement.seats) - {seat}


@given(worlds, st.data())
def test_a_loss_moves_no_byte_and_leaves_everybody_with_as_much(
    count: int, data: st.DataObject
) -> None:
    before = world(count)
    lost = Seat(data.draw(st.integers(0, count - 1)))
    after = shrink(before, lost)
    for seat in after.seats:
        assert after.owned(seat) <= held(before, seat), "whoever owns a block held it already"
        assert len(after.owned(seat)) == count
    assert set(after.owner) == set(before.owner)
    assert lost not in after.owner.values()
    assert lost not in after.replica.values()


@given(worlds, st.data())
def test_down_to_one_rank_no_loss_moves_a_byte_before_training_goes_on(
    count: int, data: st.DataObject
) -> None:
    placement = world(count)
    while len(placement.seats) > 1:
        before = placement
        lost = data.draw(st.sampled_from(placement.seats))
        after = shrink(before, lost)
        for seat in after.seats:
            assert after.owned(seat) <= held(before, seat)
        placement, copies = replicate(after)
        for copy in copies:
            assert copy.block in after.owned(copy.source)
            assert copy.source != copy.target
        sizes = [len(placement.owned(s)) for s in placement.seats]
        assert sum(sizes) == count * (count - 1)
        # Whole blocks, and replicas that were spread one by one.
        assert max(sizes) - min(sizes) <= 1 + count - len(sizes)
        for block, owner in placement.owner.items():
            assert len(sizes) == 1 or placement.replica[block] not in (None, owner)


def test_what_is_copied_afterwards_is_the_lost_share_and_its_replicas() -> None:
    after = shrink(world(8), Seat(3))
    _, copies = replicate(after)
    # Seven blocks lost their owner, seven others their replica; of 56.
    assert len(copies) == 14


def test_two_losses_before_the_copies_are_refused_where_a_block_is_gone() -> None:
    once = shrink(world(4), Seat(0))
    with pytest.raises(ValueError, match="seat 1 alone held blocks"):
        shrink(once, Seat(1))


def test_contiguous_shards_move_a_quarter_to_a_half() -> None:
    assert contiguous_shrink(64, 63) == pytest.approx(0.5, abs=0.01)
    assert contiguous_shrink(64, 32) == pytest.approx(0.25, abs=0.01)


def test_one_rank_has_nobody_to_lie_on() -> None:
    with pytest.raises(ValueError, match="another rank"):
        world(1)


def test_both_placements_are_shown_and_the_one_that_moves_fewer_bytes_first() -> None:
    first, second = placements(8)
    assert (first.name, first.before, first.before_rank) == ("blocks", 0.0, 0.0)
    assert first.replicas == pytest.approx(2 / 8), "those it held, and those of what it owned"
    assert second.name == "contiguous"
    assert second.before == pytest.approx(contiguous_shrink(8, 7)) == pytest.approx(0.5)
    assert second.before_rank <= 1 / 7 + 1e-9, "a new shard at most"
    with pytest.raises(ValueError, match="there is none"):
        placements(1)
