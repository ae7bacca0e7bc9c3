"""A world is its members in the order of seats."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftkit.core.errors import ProtocolError
from ftkit.core.ids import Generation, MemberId, NodeId, Seat
from ftkit.core.world import Member, World


def member(seat: int, number: int) -> Member:
    return Member(member=MemberId(number), seat=Seat(seat), node=NodeId(0), host="h", port=1)


@given(st.lists(st.integers(0, 20), unique=True, max_size=8))
def test_rank_is_the_position_by_seat_whatever_order_they_came_in(seats: list[int]) -> None:
    world = World.of(Generation(1), [member(s, 100 + s) for s in seats])
    assert world.size == len(seats)
    assert world.member_ids == {100 + s for s in seats}
    for rank, seat in enumerate(sorted(seats)):
        assert world.rank_of(MemberId(100 + seat)) == rank
    assert world.rank_of(MemberId(1)) is None


def test_two_members_never_share_a_seat() -> None:
    with pytest.raises(ValueError, match="distinct seats"):
        World.of(Generation(1), [member(2, 1), member(2, 2)])
    with pytest.raises(ValueError, match="order"):
        World(generation=Generation(1), members=(member(2, 1), member(1, 2)))


def test_a_world_from_the_wire_with_a_seat_twice_is_the_peers_fault() -> None:
    value = World.of(Generation(1), [member(1, 1)]).to_json()
    members = value["members"]
    assert isinstance(members, list)
    with pytest.raises(ProtocolError, match="not a world"):
        World.from_json(value | {"members": members * 2})
