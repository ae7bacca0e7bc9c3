"""Five thousand nodes: each reports every eight seconds, and is judged as if it were a small job's."""

from collections.abc import Callable

import pytest

from ftkit.core.clock import ManualClock
from ftkit.core.ids import NodeId, Seat
from ftkit.core.verdict import Fault, Verdict
from ftkit.detection.config import DetectionConfig
from ftkit.detection.detector import Detector
from ftkit.detection.observations import ObserverLate, RowSeen, WorldChanged
from ftkit.detection.row import OpRecord, Row
from tests.detection.scene import facts, row, world
from tests.detection.test_desync import records

CONFIG = DetectionConfig(max_stall_s=30.0, nodes=5000)


class LargeJob:
    """A seat on each of those nodes that are played, which take turns to report.

    `rows` gives what a seat's row is at a moment, `ops` its collectives.
    """

    def __init__(self, nodes: int = 16) -> None:
        self.world = world(nodes, per_node=1)
        self.clock = ManualClock(1000.0)
        self.detector = Detector(CONFIG)
        self.detector.ingest(WorldChanged(world=self.world, at=self.clock.now()))
        self.rows: Callable[[int, float], Row] = training
        self.ops: Callable[[int], list[OpRecord]] = lambda seat: []
        self.every_s = CONFIG.report_s
        self.late_s = 0.0
        self._due = [1000.0 + self.every_s * seat / nodes for seat in range(nodes)]

    def until(self, seconds: float) -> list[list[Verdict]]:
        """What was said at each tick."""
        said = list[list[Verdict]]()
        for _ in range(round(seconds / CONFIG.tick_s)):
            self.clock.advance(CONFIG.tick_s)
            now = self.clock.now()
            for seat in (s for s, due in enumerate(self._due) if due <= now):
                self._due[seat] = now + self.every_s
                self.detector.ingest(ObserverLate(by_s=self.late_s, who=NodeId(seat)))
                self.detector.ingest(
                    RowSeen(
                        member=self.world.members[seat].member,
                        seat=Seat(seat),
                        row=self.rows(seat, now),
                        facts=facts(),
                        at=now,
                        ops=self.ops(seat),
                    )
                )
            said.append(self.detector.tick(now))
        return said


def training(seat: int, now: float) -> Row:
    """Steps of 0.3 s."""
    step = int(now / 0.3)
    return row(100 + seat, step=step, entered=step, moved=now - 0.1, heartbeat=now)


def test_who_trains_is_neither_named_nor_out_of_sight() -> None:
    job = LargeJob()
    assert not any(job.until(120.0)[-200:])
    assert job.detector.blind == {}


@pytest.mark.parametrize("late_s", [0.0, 0.6])
def test_a_hang_is_found_though_hosts_are_a_little_late(late_s: float) -> None:
    job = LargeJob()
    job.late_s = late_s  # 600 ms in eight seconds, each in another half second
    job.until(60.0)
    stuck = job.clock.now()

    def hung(seat: int, now: float) -> Row:
        if seat == 5:
            return row(105, step=9, entered=50, moved=stuck, heartbeat=now)
        return row(100 + seat, step=9, entered=51, pending_since=stuck, moved=stuck, heartbeat=now)

    job.rows = hung
    said = job.until(CONFIG.max_stall_s + 2 * CONFIG.report_s)
    assert not any(v.evicts for verdicts in said[:60] for v in verdicts)
    assert [(v.fault, v.seat) for v in said[-1]] == [(Fault.HANG_BLOCKED, 5)]


def test_members_that_call_different_collectives_are_told_apart_by_all_that_tell() -> None:
    job = LargeJob(nodes=4)
    job.until(14.0)
    stuck = job.clock.now()
    job.rows = lambda seat, now: row(
        100 + seat, entered=2, pending_since=stuck, moved=stuck, heartbeat=now
    )
    # The first two to tell are one of each side: nobody can say yet who is right.
    job.ops = lambda seat: records(
        100 + seat, ["all_reduce", "barrier" if seat == 1 else "exchange"]
    )
    said = job.until(20.0)
    named = [[v.seat for v in verdicts if v.fault is Fault.DESYNC] for verdicts in said]
    assert all(seats in ([], [1]) for seats in named)
    # All of them count for as long as it lasts.
    assert [v.evidence["members"] for v in said[-1] if v.fault is Fault.DESYNC] == [4]
