"""What the ledger hands out is what was played, and never more than there is room for."""

import json

from ftkit.core.ids import Generation, MemberId, Seat, Step
from ftkit.detection.lateness import join
from ftkit.detection.ledger import SEATS_MAX, WAITS_MAX, Ledger
from ftkit.detection.signals import StepSeen


def step(number: int, work: dict[int, float], wait: dict[int, float], *, generation: int = 1):
    return {
        MemberId(seat): StepSeen(
            member=MemberId(seat),
            seat=Seat(seat),
            generation=Generation(generation),
            step=Step(number),
            at=0.0,
            seconds={"data": 9.0, "forward": spent},
            waited_s=wait[seat],
            place=f"dp={seat}",
        )
        for seat, spent in work.items()
    }


def test_work_wait_and_who_waited_for_whom() -> None:
    ledger = Ledger()
    ledger.add(step(4, {0: 1.0, 1: 2.0}, {0: 1.25, 1: 0.25}))
    ledger.add(step(5, {0: 1.5, 2: 1.0}, {0: 0.25, 2: 0.75}))
    assert ledger.take() == [], "nothing is full"
    (event,) = ledger.take(rest=True)
    assert json.loads(json.dumps(event)) == {
        "generation": 1,
        "steps": [4, 5],
        "seats": [0, 1, 2],
        "places": ["dp=0", "dp=1", "dp=2"],
        "work": [[1.0, 1.5], [2.0, None], [None, 1.0]],
        "wait": [[1.25, 0.25], [0.25, None], [None, 0.75]],
        "seats_left_out": 0,
        "waits": [[0, 1, 1.0], [2, 0, 0.5]],
        "waits_from": "steps",
        "transfers": [],
    }
    assert ledger.take(rest=True) == []


def test_collectives_tell_more_exactly_than_steps() -> None:
    ledger = Ledger()
    ledger.add(step(4, {0: 1.0, 1: 2.0}, {0: 1.25, 1: 0.25}))
    own = {Seat(0): (0.5, 0.125), Seat(1): (0.25, 1.0)}
    ledger.join(join(Generation(1), 7, 4, own))
    victim = {Seat(0): (0.75, 0.5), Seat(1): (0.25, 0.5)}
    ledger.join(join(Generation(1), 7, 8, victim))
    (event,) = ledger.take(rest=True)
    assert event["waits"] == [[0, 1, 0.25]]
    assert event["waits_from"] == "collectives"
    assert event["transfers"] == [[7, 0.25, 2]]


def test_a_generation_has_events_of_its_own() -> None:
    ledger = Ledger()
    ledger.add(step(4, {0: 1.0}, {0: 0.0}))
    ledger.add(step(2, {0: 1.0}, {0: 0.0}, generation=2))
    assert [(e["generation"], e["steps"]) for e in ledger.take(rest=True)] == [(1, [4]), (2, [2])]


def test_of_many_ranks_those_are_kept_that_differ() -> None:
    ledger, size = Ledger(), 600
    odd = {7: 5.0, 599: 0.1}
    work = {seat: odd.get(seat, 1.0 + seat * 1e-6) for seat in range(size)}
    for number in range(40):
        ledger.add(step(number, work, {seat: 0.001 * seat for seat in range(size)}))
    events = ledger.take(rest=True)
    for event in events:
        assert {7, 599} <= set(event["seats"])  # type: ignore[call-overload]
        assert len(event["seats"]) == SEATS_MAX  # type: ignore[arg-type]
        assert len(event["waits"]) == WAITS_MAX  # type: ignore[arg-type]
        assert event["seats_left_out"] == size - SEATS_MAX
        assert len(json.dumps(event)) < 200_000
    assert [s for e in events for s in e["steps"]] == list(range(40))  # type: ignore[attr-defined]
