"""What is slow between places: the matrix of rates is read as a person would read it."""

import itertools
import random

import pytest

from ftkit.detection.paths import Cell, Pair, Where, bad_cells, further, read

MB = 1_000_000


def cell(seconds: float = 0.02, repeats: int = 5) -> Cell:
    return Cell(nbytes=MB, seconds=seconds, repeats=repeats)


def matrix(
    places: int, slow: dict[Pair, float] | None = None, jitter: float = 0.3
) -> dict[Pair, Cell]:
    """Everybody with everybody, 20 ms and some; `slow` are factors."""
    rng = random.Random(places)
    return {
        pair: cell(0.02 * (1 + jitter * rng.random()) * (slow or {}).get(pair, 1.0))
        for pair in itertools.permutations(range(places), 2)
    }


def named(
    cells: dict[Pair, Cell], history: dict[Pair, float] | None = None
) -> list[tuple[object, ...]]:
    return [(f.where, f.place, f.peer) for f in read(cells, history or {})]


def test_jitter_is_healthy():
    for places in range(2, 9):
        assert named(matrix(places)) == []


@pytest.mark.parametrize("places", [3, 4, 6])
@pytest.mark.parametrize("factor", [6, 50])
def test_each_fault_has_its_shape(places: int, factor: float):
    others = [p for p in range(places) if p != 2]
    row = {(2, p): factor for p in others}
    column = {(p, 2): factor for p in others}
    assert named(matrix(places, row)) == [(Where.EGRESS, 2, None)]
    assert named(matrix(places, column)) == [(Where.INGRESS, 2, None)]
    both = {(0, 1): factor, (1, 0): factor}
    assert named(matrix(places, both)) == [(Where.LINK, 0, 1)]
    assert named(matrix(places, {(1, 0): factor})) == [(Where.DIRECTION, 1, 0)]
    if places > 3:  # of three, two thirds of all cells are the NIC's: without history no median
        assert named(matrix(places, row | column)) == [(Where.NIC, 2, None)]


def test_three_times_is_told_by_history_where_the_median_cannot():
    history = {pair: c.rate for pair, c in matrix(3, jitter=0).items()}
    slow = {(0, 1): 2.6, (1, 0): 2.6}
    assert named(matrix(3, slow, jitter=0.1)) == []
    assert named(matrix(3, slow, jitter=0.1), history) == [(Where.LINK, 0, 1)]
    nic = {p: 3.0 for p in itertools.permutations(range(3), 2) if 2 in p}
    assert named(matrix(3, nic), history) == [(Where.NIC, 2, None)]
    everything = dict.fromkeys(itertools.permutations(range(3), 2), 3.0)
    assert named(matrix(3, everything), history) == [], "every machine may be busy"
    busy = everything | {(0, 1): 9.0, (1, 0): 9.0}
    assert named(matrix(3, busy), history) == [(Where.LINK, 0, 1)]


def test_the_last_cell_of_a_row_may_be_doubtful():
    slow = {(2, 0): 4.0, (2, 1): 4.0, (2, 3): 2.6}
    assert named(matrix(4, slow, jitter=0)) == [(Where.EGRESS, 2, None)]
    slow[2, 3] = 1.5
    assert named(matrix(4, slow, jitter=0)) == [(Where.DIRECTION, 2, 0), (Where.DIRECTION, 2, 1)]


def test_what_is_bad_beside_the_worst_is_left_for_the_next_time():
    slow = {(2, p): 100.0 for p in (0, 1, 3, 4)} | {(3, 4): 5.0}
    assert named(matrix(5, slow)) == [(Where.EGRESS, 2, None)]


def test_paths_that_were_always_unlike_are_healthy_with_history():
    wide = matrix(4, {(0, 3): 2.9, (3, 0): 2.9}, jitter=0)
    assert named(wide, {p: c.rate for p, c in wide.items()}) == []


def test_two_places_cannot_tell_a_link_from_a_nic_and_say_so():
    [fault] = read({(0, 1): cell(0.2), (1, 0): cell(0.02)}, {})
    assert (fault.where, fault.place, fault.peer, fault.alone) == (Where.DIRECTION, 0, 1, True)
    assert fault.share == pytest.approx(0.1)
    with_history = read({(0, 1): cell(0.2), (1, 0): cell(0.2)}, {(0, 1): 5e7, (1, 0): 5e7})
    assert [(f.where, f.alone) for f in with_history] == [(Where.LINK, True)]
    [seen] = read(matrix(4, {(1, 2): 9, (2, 1): 9}), {})
    assert not seen.alone


def test_short_tests_and_few_repeats_say_nothing():
    fast = {p: cell(0.0005) for p in itertools.permutations(range(4), 2)}
    assert named(fast | {(0, 1): cell(0.0049)}) == []
    assert named(fast | {(0, 1): cell(0.0051)}) == [(Where.DIRECTION, 0, 1)]
    assert named(fast | {(0, 1): cell(0.03, repeats=4)}) == []
    assert named(fast | {(0, 1): cell(0.3, repeats=1)}) == [(Where.DIRECTION, 0, 1)]


def test_what_carries_nothing_is_dead():
    dead = Cell(nbytes=1, seconds=float("inf"), repeats=0)
    [fault] = read(matrix(3) | {(0, 1): dead, (1, 0): dead}, {})
    assert (fault.where, fault.place, fault.peer, fault.share) == (Where.LINK, 0, 1, 0.0)


def test_two_faults_are_two():
    slow = {(0, p): 9.0 for p in range(1, 7)} | {(3, 4): 9.0, (4, 3): 9.0}
    assert named(matrix(7, slow)) == [(Where.EGRESS, 0, None), (Where.LINK, 3, 4)]


def test_the_ring_alone_tells_a_link_and_more_tests_a_nic():
    ring = {p: c for p, c in matrix(8).items() if (p[0] - p[1]) % 8 in (1, 7)}
    ring |= {(2, 3): cell(0.3)}
    bad = bad_cells(ring, {})
    assert set(bad) == {(2, 3)}
    more = further(ring, bad, range(8), {(2, 7): 1.0})
    assert all(len({2, 3} & {*p}) == 1 for p in more)
    assert all(p not in ring for p in more)
    assert len(more) == 6, "each end meets three"
    assert (2, 7) in more, "it has a history with that one"
    both = {(a, b): cell(0.3 if a == 2 else 0.02) for p in more for a, b in (p, p[::-1])}
    # A NIC that sends slowly to new acquaintances was slow to the old one, on the other side, too.
    assert named(ring | both | {(2, 1): cell(0.3)}) == [(Where.EGRESS, 2, None)]
    good = {(a, b): cell() for p in more for a, b in (p, p[::-1])}
    assert named(ring | good) == [(Where.DIRECTION, 2, 3)]


def test_nothing_measured_says_nothing():
    assert read({}, {}) == []
    assert further({}, [], range(4), {}) == []
