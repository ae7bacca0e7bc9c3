"""Leaks, full disks, clocks that are off, nodes that come and go: said in time, of the right one."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftkit.core.errors import ProtocolError
from ftkit.core.ids import MemberId, NodeId, Seat
from ftkit.core.verdict import Fault, Verdict
from ftkit.detection.clock_skew import ClockSkew, offset_of
from ftkit.detection.flapping import HALF_LIFE_S, Flapping
from ftkit.detection.leak import Leaks, theil_sen
from ftkit.detection.observations import ProcessFacts, RowSeen, WorldChanged
from ftkit.detection.room import Room
from ftkit.detection.signals import ClockSeen, NodeGap, NodeSeen, from_json, to_json
from tests.detection.scene import row, world

GIB = 1 << 30
MIB = 1 << 20
FACTS = ProcessFacts(state="R", cpu_ticks=1, rss_bytes=0)


def node_seen(node: int = 0, *, left: int = 8 * GIB, at: float = 0.0, **more: object) -> NodeSeen:
    return NodeSeen(node=NodeId(node), at=at, available_bytes=left, **more)  # type: ignore[arg-type]


def watch(
    memory: Callable[[float], float], seconds: int, *, left: int = 8 * GIB, step: int = 10
) -> list[tuple[float, Verdict]]:
    """Member 101's memory over time, looked at twice a second; 100's stays as it is."""
    leaks = Leaks()
    leaks.ingest(WorldChanged(world=world(2), at=0.0))
    said = []
    for tick in range(2 * seconds):
        now = tick / 2
        left_now = left - round(memory(now) - memory(0.0))
        leaks.ingest(node_seen(left=left_now, at=now))
        for member, nbytes in ((100, GIB), (101, memory(now))):
            leaks.ingest(
                RowSeen(
                    member=MemberId(member),
                    seat=Seat(member - 100),
                    row=row(member, step=step),
                    facts=replace(FACTS, rss_bytes=round(nbytes)),
                    at=now,
                )
            )
        said += [(now, verdict) for verdict in leaks.tick(now)]
    return said


@pytest.mark.parametrize(("mib_a_minute", "within_s"), [(100, 600), (1000, 600), (6000, 60)])
def test_a_leak_is_said_with_the_time_that_is_left(mib_a_minute: float, within_s: float) -> None:
    noise = random.Random(0)
    rate = mib_a_minute * MIB / 60

    def memory(now: float) -> float:
        return GIB + rate * now + noise.uniform(-20, 20) * MIB

    first, verdict = watch(memory, 640)[0]
    assert first <= within_s
    assert (verdict.fault, verdict.seat) == (Fault.LEAK, 1)
    oom = verdict.evidence["oom_s"]
    assert isinstance(oom, list)
    truth = (8 * GIB - rate * first) / rate
    assert oom[1] == pytest.approx(truth, rel=0.25)
    assert oom[0] <= oom[1] <= oom[2]


def test_memory_that_steps_up_or_breathes_or_grows_slowly_is_no_leak() -> None:
    noise = random.Random(1)
    assert watch(lambda now: GIB + (3 * GIB if now > 100 else 0), 600) == []
    assert watch(lambda now: GIB + noise.uniform(0, 2 * GIB), 600) == []
    assert watch(lambda now: GIB + now * MIB / 60, 1200) == []
    fast = 100 * MIB
    assert watch(lambda now: GIB + fast * now, 60, step=2) == [], "everything is new at first"


def test_the_slope_of_theil_and_sen_is_not_moved_by_outliers() -> None:
    line = [(float(x), 3.0 * x) for x in range(20)]
    assert theil_sen(line).low == theil_sen(line).high == pytest.approx(3.0)
    line[7] = (7.0, 1e6)
    assert theil_sen(line).middle == pytest.approx(3.0)


def test_a_disk_is_too_full_before_the_write() -> None:
    room = Room()
    assert room.tick(0.0) == []
    room.ingest(WorldChanged(world=world(4), at=0.0))
    room.ingest(node_seen(0, disks={"/data": [10 * GIB, GIB]}))
    room.ingest(node_seen(1, disks={"/data": [GIB, GIB], "/run": [GIB, MIB]}))
    (verdict,) = room.tick(1.0)
    assert (verdict.fault, verdict.seat, verdict.evidence["path"]) == (Fault.DISK, 2, "/data")
    room.ingest(node_seen(1, disks={"/data": [2 * GIB, GIB]}))
    assert room.tick(2.0) == []


def test_a_disk_that_is_none_is_refused_at_the_door() -> None:
    wrong = to_json(node_seen()) | {"disks": {"/data": [1]}}
    with pytest.raises(ProtocolError):
        from_json(wrong)


@given(st.floats(-100, 100), st.floats(0, 2), st.floats(0, 2), st.floats(0, 5))
def test_the_offset_is_within_its_error(
    ahead: float, there: float, back: float, held: float
) -> None:
    sent = 1000.0
    received = sent + there + ahead
    answered = received + held
    offset, error = offset_of(sent, received, answered, sent + there + held + back)
    assert abs(offset - ahead) <= error + 1e-9


def clock(offset_s: float, error_s: float = 0.001, node: int = 1) -> ClockSeen:
    return ClockSeen(node=NodeId(node), at=0.0, offset_s=offset_s, error_s=error_s)


def skew(*seen: ClockSeen) -> Sequence[Verdict]:
    clocks = ClockSkew()
    clocks.ingest(WorldChanged(world=world(4), at=0.0))
    for one in seen:
        clocks.ingest(one)
    return clocks.tick(1.0)


def test_a_clock_that_is_off_is_said_when_it_is_certain() -> None:
    (verdict,) = skew(clock(0.06), clock(0.06))
    assert (verdict.fault, verdict.seat) == (Fault.CLOCK, 2)
    assert "ahead" in verdict.reason
    assert "behind" in skew(clock(-5.0), clock(-5.0))[0].reason
    assert skew(clock(0.06)) == [], "once is not enough"
    assert skew(clock(0.04), clock(0.04)) == []
    assert skew(clock(3.0, 3.0), clock(3.0, 3.0)) == [], "the message was that long on its way"
    assert skew(clock(3.0, 3.0), clock(0.01, 0.001)) == [], "the shortest exchange counts"


def test_a_node_that_comes_and_goes_is_one_incident() -> None:
    flapping = Flapping()
    flapping.ingest(WorldChanged(world=world(4), at=0.0))
    said = []
    for at in (10.0, 30.0, 50.0, 70.0):
        flapping.ingest(NodeGap(node=NodeId(1), at=at, gap_s=3.0))
        said.append([(v.fault, v.seat) for v in flapping.tick(at)])
    assert said == [[], [], [(Fault.FLAPPING, 2)], [(Fault.FLAPPING, 2)]]
    assert flapping.tick(70.0 + HALF_LIFE_S), "it is not well yet"
    assert flapping.tick(70.0 + 3 * HALF_LIFE_S) == []
    flapping.ingest(NodeGap(node=NodeId(1), at=2000.0, gap_s=3.0))
    assert flapping.tick(2000.0) == []


def test_rare_absences_are_nothing() -> None:
    flapping = Flapping()
    flapping.ingest(WorldChanged(world=world(4), at=0.0))
    for hour in range(24):
        flapping.ingest(NodeGap(node=NodeId(0), at=3600.0 * hour, gap_s=3.0))
        assert flapping.tick(3600.0 * hour) == []
