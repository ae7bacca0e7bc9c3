"""Which paths training itself makes suspect."""

import pytest

from ftkit.core.ids import Generation, MemberId, Seat, Step
from ftkit.detection.observations import WorldChanged
from ftkit.detection.path_watch import PathWatch
from ftkit.detection.signals import PathsSeen, from_json, to_json
from tests.detection.scene import world


def paths(seat: int, rates: dict[str, float], *, generation: int = 1) -> PathsSeen:
    return PathsSeen(
        member=MemberId(100 + seat),
        seat=Seat(seat),
        generation=Generation(generation),
        step=Step(1),
        at=0.0,
        rates=rates,
    )


def watch(size: int = 4) -> PathWatch:
    made = PathWatch()
    made.ingest(WorldChanged(world=world(size), at=0.0))
    return made


def test_a_path_that_drops_under_half_of_its_median_twice_is_suspect():
    one = watch()
    for rate in (1e9, 0.7e9, 1.2e9, 1e9, 0.9e9):
        one.ingest(paths(0, {"1": rate}))
    one.ingest(paths(0, {"1": 0.4e9}))
    assert [*one.suspects] == []
    one.ingest(paths(0, {"1": 1e9}))
    one.ingest(paths(0, {"1": 0.4e9}))
    assert [*one.suspects] == []
    one.ingest(paths(0, {"1": 0.3e9}))
    assert [*one.suspects] == [(0, 1)]
    for _ in range(50):
        one.ingest(paths(0, {"1": 0.4e9}))
    assert [*one.suspects] == [(0, 1)], "what is slow does not become its own excuse"
    assert one.times == pytest.approx(1 / 0.4)
    one.forgive()
    assert [*one.suspects] == []
    assert one.in_use == {(0, 1)}


def test_without_history_paths_are_compared_with_each_other():
    one = watch()
    for _ in range(3):
        for seat in range(4):
            one.ingest(paths(seat, {str((seat + 1) % 4): 1e9 if seat != 2 else 1e8}))
    assert [*one.suspects] == [(2, 3)]


def test_another_generation_says_nothing_and_a_new_one_begins_anew():
    one = watch()
    for _ in range(8):
        one.ingest(paths(0, {"1": 1e9}))
    for _ in range(3):
        one.ingest(paths(0, {"1": 1e8}, generation=2))
    assert [*one.suspects] == []
    for _ in range(3):
        one.ingest(paths(0, {"1": 1e8}))
    assert [*one.suspects] == [(0, 1)]
    one.ingest(WorldChanged(world=world(4, generation=2), at=1.0))
    assert [*one.suspects] == []
    assert one.in_use == frozenset()


def test_the_signal_crosses_the_wire():
    sent = paths(0, {"1": 1e9})
    assert from_json(to_json(sent)) == sent
