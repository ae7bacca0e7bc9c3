"""What ranks found out among themselves becomes a verdict, for a while."""

from dataclasses import replace

from ftkit.core.ids import MemberId, Seat, Step
from ftkit.core.verdict import Fault
from ftkit.detection.observations import ObserverLate
from ftkit.detection.signals import Found, from_json, to_json
from ftkit.detection.told import HOLD_S, Told

FOUND = Found(
    fault="sdc",
    member=MemberId(7),
    seat=Seat(2),
    step=Step(11),
    at=100.0,
    reason="rank 2 holds other bits",
    evidence={"tensors": ["model/0.weight"]},
    peer=Seat(1),
)


def test_it_crosses_the_wire_on_the_readers_clock() -> None:
    assert from_json(to_json(FOUND), offset_s=-40.0) == replace(FOUND, at=60.0)


def test_it_is_a_level_that_ends() -> None:
    told = Told()
    told.ingest(ObserverLate(by_s=1.0))
    assert told.tick(100.0) == []
    told.ingest(FOUND)
    (verdict,) = told.tick(101.0)
    assert (verdict.fault, verdict.member, verdict.seat, verdict.peer) == (Fault.SDC, 7, 2, 1)
    assert verdict.evidence == {"tensors": ["model/0.weight"], "step": 11}
    assert not verdict.evicts
    assert told.tick(100.0 + HOLD_S) == [verdict]
    assert told.tick(100.1 + HOLD_S) == []


def test_what_is_found_again_is_the_same_incident() -> None:
    told = Told()
    told.ingest(FOUND)
    told.ingest(replace(FOUND, at=104.0, step=Step(12)))
    (verdict,) = told.tick(108.0)
    assert (verdict.since_s, verdict.evidence["step"]) == (100.0, 12)


def test_a_fault_of_a_later_version_is_passed_over() -> None:
    told = Told()
    told.ingest(replace(FOUND, fault="melted"))
    assert told.tick(100.0) == []
