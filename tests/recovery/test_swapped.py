"""The order of a pipeline that swaps its outer stages: everybody plays all, nobody waits for ever."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftkit.recovery.swapped import Pass, Segment, Swap, orders, segments

FULL = (0, 2, 4, 6, 8)
SWAP = Swap.of(FULL)


def test_the_outer_stages_change_places_and_the_ends_do_not() -> None:
    assert SWAP.route(8, odd=False) == tuple(range(8))
    assert SWAP.route(8, odd=True) == (0, 2, 3, 1, 6, 4, 5, 7)
    assert SWAP.learned(1, 2)
    assert SWAP.learned(6, 4)
    assert not SWAP.learned(1, 4)
    two = Swap.of((0, 4, 8))
    assert two.route(8, odd=True) == (0, 4, 5, 6, 1, 2, 3, 7)


@pytest.mark.parametrize("bounds", [(0, 2, 4, 6), (0, 1, 4, 6, 8), (0, 2, 4, 6, 7), (0, 8)])
def test_what_cannot_be_swapped_is_refused(bounds: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="CheckFree"):
        Swap.of(bounds)


def test_a_route_hops_from_rank_to_rank() -> None:
    hops = segments(SWAP.route(8, odd=True), (0, 3, 8))
    assert hops == (
        Segment(0, (0, 2)), Segment(1, (3,)), Segment(0, (1,)), Segment(1, (6, 4, 5, 7)),
    )  # fmt: skip


@given(st.sets(st.integers(1, 7), max_size=7), st.integers(1, 12), st.integers(1, 9))
def test_every_rank_can_play_its_list_from_end_to_end(
    inner: set[int], slots: int, depth: int
) -> None:
    bounds = (0, *sorted(inner), 8)
    ranks = len(bounds) - 1
    routes = [segments(SWAP.route(8, odd=bool(s % 2)), bounds) for s in range(slots)]
    lists = orders(routes, ranks=ranks, depth=depth)
    # Each rank takes its next pass once the one before it on the route is over, and only then.
    over, at, slots_of = set[Pass](), [0] * ranks, dict[tuple[int, bool], list[int]]()
    moved = True
    while moved:
        moved = False
        for rank, todo in enumerate(lists):
            while at[rank] < len(todo) and before(todo[at[rank]], routes) <= over:
                each = todo[at[rank]]
                assert routes[each.slot][each.hop].rank == rank
                for layer in routes[each.slot][each.hop].layers:
                    slots_of.setdefault((layer, each.backward), []).append(each.slot)
                over.add(each)
                at[rank] += 1
                moved = True
    assert at == [len(todo) for todo in lists], "somebody waits for ever"
    assert len(over) == sum(2 * len(route) for route in routes)
    # Gradients are added up, and buffers change, in the order of slots.
    assert slots_of == {(i, b): list(range(slots)) for i in range(8) for b in (False, True)}


def before(each: Pass, routes: list[tuple[Segment, ...]]) -> set[Pass]:
    """What has to be over first."""
    if not each.backward:
        return {each._replace(hop=each.hop - 1)} if each.hop else set()
    if each.hop + 1 < len(routes[each.slot]):
        return {each._replace(hop=each.hop + 1)}
    return {each._replace(backward=False)}


def test_no_more_are_under_way_than_was_said() -> None:
    routes = [segments(SWAP.route(8, odd=bool(s % 2)), FULL) for s in range(12)]
    first, _, _, last = orders(routes, ranks=4, depth=3)
    under_way = most = 0
    for each in first:
        if each.hop == 0:
            under_way += -1 if each.backward else 1
            most = max(most, under_way)
    assert most == 3
    assert [each.slot for each in last if each.backward and each.hop == 5] == [1, 3, 5, 7, 9, 11]
