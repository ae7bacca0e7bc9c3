"""Random healthy jobs are never accused; a stall put into one is named, alone and in time."""

from dataclasses import dataclass
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from ftkit.core.ids import Generation, MemberId, Seat, Step
from ftkit.core.verdict import Verdict
from ftkit.detection.config import DetectionConfig
from ftkit.detection.detector import Detector
from ftkit.detection.observations import ObserverLate, RowSeen, WorldChanged
from ftkit.detection.row import Phase, Row
from tests.detection.scene import facts, world

CONFIG = DetectionConfig(max_stall_s=5.0)
START = 100.0


@dataclass(frozen=True)
class Schedule:
    """When each rank begins to compute and enters each step's all-reduce, and when all leave.

    A synchronous job: step k's all-reduce ends when the last rank has entered it.
    """

    computes: list[list[float]]
    transfer: float
    hung: tuple[int, int] | None = None

    def row(self, rank: int, now: float) -> Row:
        began = START
        for step, computes in enumerate(self.computes, start=1):
            enters = [
                float("inf") if self.hung == (r, step) else began + c
                for r, c in enumerate(computes)
            ]
            if now < enters[rank]:
                return self._row(rank, step, moved=began, entered=step - 1)
            left = max(enters) + self.transfer
            if now < left:
                return self._row(rank, step, moved=enters[rank], entered=step, pending=True)
            began = left
        return self._row(
            rank, len(self.computes), moved=began, entered=len(self.computes), done=True
        )

    def end(self) -> float:
        return START + sum(max(c) + self.transfer for c in self.computes)

    def hang_at(self) -> float:
        """When the hang counts from: the culprit's last move or the first waiter."""
        assert self.hung
        rank, step = self.hung
        began = START + sum(max(c) + self.transfer for c in self.computes[: step - 1])
        return began + min(c for r, c in enumerate(self.computes[step - 1]) if r != rank)

    def _row(
        self,
        rank: int,
        step: int,
        *,
        moved: float,
        entered: int,
        pending: bool = False,
        done: bool = False,
    ) -> Row:
        moved_ns = int(moved * 1e9)
        return Row(
            member=MemberId(100 + rank),
            pid=1,
            generation=Generation(1),
            step=Step(step),
            phase=Phase.DONE if done else Phase.REDUCE if pending else Phase.FORWARD,
            group=0,
            entered=entered,
            left=entered - pending,
            op="all_reduce",
            t_progress_ns=moved_ns,
            t_enter_ns=moved_ns if pending else 0,
            t_heartbeat_ns=0,
            allowance_ns=0,
            warm=True,
        )


def look(detector: Detector, schedule: Schedule, now: float, lags: list[float]) -> list[Verdict]:
    """One tick; each row was read up to a tick before it."""
    for rank, lag in enumerate(lags):
        at = now - lag
        detector.ingest(
            RowSeen(
                member=MemberId(100 + rank),
                seat=Seat(rank),
                row=schedule.row(rank, at),
                facts=facts(),
                at=at,
            )
        )
    return detector.tick(now)


@st.composite
def schedules(draw, *, hang: bool = False) -> Schedule:
    size = draw(st.integers(2, 5))
    steps = draw(st.integers(2, 8))
    random = Random(draw(st.integers(0, 2**32)))
    computes = [
        [
            random.choice((0.01, 0.5, 0.98)) * random.random() * CONFIG.max_stall_s
            for _ in range(size)
        ]
        for _ in range(steps)
    ]
    hung = (draw(st.integers(0, size - 1)), draw(st.integers(1, steps))) if hang else None
    return Schedule(computes=computes, transfer=draw(st.floats(0.0, 0.5)), hung=hung)


@settings(max_examples=150, deadline=None)
@given(schedule=schedules(), seed=st.integers(0, 2**32))
def test_a_healthy_job_is_never_accused(schedule: Schedule, seed: int) -> None:
    detector = Detector(CONFIG)
    detector.ingest(WorldChanged(world=world(len(schedule.computes[0])), at=START))
    random = Random(seed)
    now = START
    while now < schedule.end() + 1:
        gap = CONFIG.tick_s * random.uniform(0.5, 1.5)
        if random.random() < 0.05:  # the observer is starved, up to three limits long
            gap = random.uniform(0, 3 * CONFIG.max_stall_s)
            if random.random() < 0.5:
                detector.ingest(ObserverLate(by_s=gap))
        now += gap
        lags = [random.uniform(0, CONFIG.tick_s) for _ in schedule.computes[0]]
        assert look(detector, schedule, now, lags) == []


@settings(max_examples=150, deadline=None)
@given(schedule=schedules(hang=True), seed=st.integers(0, 2**32))
def test_a_hang_is_named_alone_and_in_time(schedule: Schedule, seed: int) -> None:
    assert schedule.hung is not None
    culprit, step = schedule.hung
    detector = Detector(CONFIG)
    size = len(schedule.computes[0])
    detector.ingest(WorldChanged(world=world(size), at=START))
    random = Random(seed)
    began = schedule.hang_at()
    now = START
    while True:
        now += CONFIG.tick_s * random.uniform(0.5, 1.0)
        verdicts = look(detector, schedule, now, [0.0] * size)
        if verdicts:
            break
        assert now <= began + detector.limit_s + 2 * CONFIG.tick_s
    assert now > began + CONFIG.max_stall_s
    for _ in range(50):
        assert [v.seat for v in verdicts] == [culprit]
        assert verdicts[0].evicts
        assert verdicts[0].evidence["step"] == step
        now += CONFIG.tick_s
        verdicts = look(detector, schedule, now, [0.0] * size)
