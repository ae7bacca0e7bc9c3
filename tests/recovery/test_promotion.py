"""Whoever is lost, the others own its blocks already; whoever comes gets some beside training."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftkit.core.ids import NodeId, Seat
from ftkit.recovery.promotion import BlocksLost, copies, fresh, layouts, settle
from ftkit.recovery.row_blocks import block_count
from ftkit.recovery.virtual_blocks import Placement

Held = dict[Seat, frozenset[int]]


def world(count: int) -> Held:
    return fresh([Seat(s) for s in range(count)], block_count(count))


def without(held: Held, *lost: int) -> Held:
    return {seat: mine for seat, mine in held.items() if seat not in lost}


def replicated(held: Held, blocks: int) -> Held:
    """After all copies that are asked for have come, and what is held twice too often is let go."""
    for _ in range(20):
        placement = settle(held, blocks)
        held = kept(placement, held)
        made = copies(placement, held)
        if not made:
            return held
        for copy in made:
            assert copy.block in held[copy.source]
            assert copy.block not in held[copy.target]
            held[copy.target] |= {copy.block}
    raise AssertionError("copies are asked for without an end")


def kept(placement: Placement, seats: Held) -> Held:
    return {
        seat: frozenset(
            b for b in placement.owner if seat in (placement.owner[b], placement.replica[b])
        )
        for seat in seats
    }


def owned(placement: Placement, held: Held) -> list[int]:
    return sorted(len(placement.owned(seat)) for seat in held)


@given(st.integers(2, 9))
def test_every_block_has_an_owner_and_a_stand_in(count: int) -> None:
    held, blocks = world(count), block_count(count)
    placement = settle(held, blocks)
    assert set(owned(placement, held)) == {blocks // count}
    for block, owner in placement.owner.items():
        standby = placement.replica[block]
        assert standby is not None
        assert standby != owner
        assert block in held[owner] & held[standby]
    assert copies(placement, held) == []
    assert layouts(placement, held) == count


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 9), st.data())
def test_a_loss_moves_nothing_and_leaves_owners_even_and_so_does_the_next(
    count: int, data: st.DataObject
) -> None:
    held, blocks = world(count), block_count(count)
    while len(held) > 1:
        lost = data.draw(st.sampled_from(sorted(held)))
        before, held = held, without(held, lost)
        owners = settle(before, blocks).owner
        placement = settle(held, blocks, before=owners)
        for seat in held:
            assert placement.owned(seat) <= before[seat], "whoever owns a block held it already"
        sizes = owned(placement, held)
        assert sizes[-1] - sizes[0] <= 1
        held = replicated(held, blocks)
        if len(held) > 1:
            assert None not in settle(held, blocks).replica.values()


@settings(max_examples=30, deadline=None)
@given(st.integers(3, 9), st.data())
def test_newcomers_hold_their_share_in_the_end(count: int, data: st.DataObject) -> None:
    held, blocks = world(count), block_count(count)
    lost = data.draw(st.sets(st.sampled_from(sorted(held)), min_size=1, max_size=count - 1))
    for seat in lost:
        held = replicated(without(held, seat), blocks)
    held = replicated({**held, **{seat: frozenset() for seat in lost}}, blocks)
    sizes = [len(mine) for mine in held.values()]
    assert max(sizes) - min(sizes) <= 2
    assert sum(sizes) == 2 * blocks
    placement = settle(held, blocks)
    assert owned(placement, held)[0] > 0
    for seat in held:  # and any of them may be lost
        settle(without(held, seat), blocks)


def test_who_is_left_goes_on_to_own_what_it_owned() -> None:
    held = world(4)
    before = settle(held, 12)
    after = settle(without(held, 3), 12, before=before.owner)
    for seat in (0, 1, 2):
        assert after.owned(Seat(seat)) > before.owned(Seat(seat))
        assert len(after.owned(Seat(seat))) == 4


def test_an_owner_and_its_stand_in_are_lost_together() -> None:
    held = world(4)
    with pytest.raises(BlocksLost, match=r"blocks \[.*\] of 12 are held by none of seats \[0, 3\]"):
        settle(without(held, 1, 2), 12)


@given(st.integers(2, 4), st.integers(1, 3))
def test_a_node_is_lost_with_all_its_ranks(count: int, ranks: int) -> None:
    seats = [Seat(s) for s in range(count * ranks)]
    nodes = {seat: NodeId(seat // ranks) for seat in seats}
    blocks = block_count(len(seats))
    held = fresh(seats, blocks, nodes)
    for node in range(count):
        left = {seat: mine for seat, mine in held.items() if nodes[seat] != node}
        settle(left, blocks, nodes)
    sizes = [len(mine) for mine in held.values()]
    assert max(sizes) - min(sizes) <= 2


def test_stand_ins_made_anew_are_on_another_node_too() -> None:
    nodes = {Seat(s): NodeId(s // 2) for s in range(6)}
    held = without(fresh(list(nodes), 30, nodes), 0, 1)
    placement = settle(held, 30, nodes)
    for copy in copies(placement, held, nodes):
        held[copy.target] |= {copy.block}
    settle(without(held, 2, 3), 30, nodes)
    settle(without(held, 4, 5), 30, nodes)


def test_it_does_not_matter_who_owned_what_or_in_which_order_it_is_told() -> None:
    held = world(4)
    turned = dict(reversed(list(held.items())))
    assert settle(held, 12) == settle(turned, 12)
    alone = settle({Seat(3): range(12)}, 12)
    assert alone.owned(Seat(3)) == frozenset(range(12))
    assert copies(alone, [Seat(3)]) == []
    assert layouts(alone, [Seat(3), Seat(5)]) == 2, "who owns nothing has buffers only"
