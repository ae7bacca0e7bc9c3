"""A group whose collectives carry less is found out of all groups, by what its members tell."""

import random

import pytest

from ftkit.core.ids import Generation, MemberId, NodeId, Seat
from ftkit.core.verdict import Fault, Verdict
from ftkit.detection.inquiry import Inquiry
from ftkit.detection.node_ops import NodeOps
from ftkit.detection.observations import WorldChanged
from ftkit.detection.row import OpRecord
from ftkit.detection.signals import CommSeen, NodeSeen, PairSeen
from ftkit.detection.slow_transfers import BUSY, LASTS_S
from ftkit.detection.step_detector import PaceConfig, StepDetector
from tests.detection.scene import world

SIZE = 4
#: Tensor parallel on each node, data parallel between the two nodes.
TENSOR, DATA = {11: (0, 1), 12: (2, 3)}, {21: (0, 2), 22: (1, 3)}
BIG = 1 << 20


class Job:
    def __init__(self) -> None:
        self.detector = StepDetector(PaceConfig())
        self.detector.ingest(WorldChanged(world=world(SIZE), at=0.0))
        self.rng = random.Random(3)
        self.now = 0.0
        self.seq = 0

    def play(self, seconds: float, took: dict[int, float], *, nbytes: int = BIG) -> list[Verdict]:
        """Ten collectives a second of every group; `took` says what those take that are slow."""
        for _ in range(int(10 * seconds)):
            self.now += 0.1
            self.seq += 1
            for group, seats in (TENSOR | DATA).items():
                late = [0.5 * self.rng.random() for _ in seats]
                for seat, mine in zip(seats, late, strict=True):
                    spent = max(late) - mine + took.get(group, 0.01) * self.rng.uniform(0.9, 1.1)
                    self.detector.ingest(
                        CommSeen(
                            seat=Seat(seat), generation=Generation(1), group=group, at=self.now,
                            seqs=[self.seq], spent_s=[spent], worked_s=[0.0], nbytes=[nbytes],
                        )
                    )  # fmt: skip
        return self.detector.tick(self.now)

    def busy(self, share: float) -> None:
        for node in (0, 1):
            self.detector.ingest(
                NodeSeen(node=NodeId(node), at=self.now, available_bytes=1, pressure={"cpu": share})
            )


def test_the_group_is_named_whose_transfers_take_longer() -> None:
    job = Job()
    assert job.play(20, {}) == []
    assert job.play(LASTS_S - 1, {21: 0.03}) == [], "a moment is none"
    (verdict,) = job.play(3, {21: 0.03})
    assert (verdict.fault, verdict.seat, verdict.peer) == (Fault.SLOW_COMM, 0, None)
    assert verdict.evidence["seats"] == [0, 2]
    assert verdict.evidence["times"] == pytest.approx(3.0, rel=0.2)
    assert "group 21 (seats 0, 2) take 3" in verdict.reason
    assert job.play(1, {}) == [], "it is over"
    assert job.play(10, {12: 0.03, 22: 0.05})[-1].evidence["group"] == 22
    job.detector.ingest(WorldChanged(world=world(SIZE, generation=2), at=job.now))
    assert job.detector.tick(job.now) == []


def test_other_sizes_noise_and_what_is_no_longer_heard_of_are_none() -> None:
    job = Job()
    job.play(20, {})
    bigger = dict.fromkeys(TENSOR | DATA, 0.1)
    assert job.play(10, bigger, nbytes=10 * BIG) == [], "they carry ten times as much"
    assert job.play(10, dict.fromkeys(bigger, 0.014)) == []
    assert job.play(10, {11: 0.05})
    assert job.detector.tick(job.now + 60.0) == []


def test_where_cores_are_fought_for_it_is_blind_and_says_so() -> None:
    job = Job()
    job.play(20, {})
    job.busy(BUSY)
    assert job.detector.transfers.blind == frozenset()
    assert job.play(10, {11: 0.05}) == []
    assert job.detector.transfers.blind == {0}
    job.busy(BUSY / 2)
    assert [v.evidence["group"] for v in job.play(1, {11: 0.05})] == [11]
    assert job.detector.transfers.blind == frozenset()


@pytest.mark.parametrize("share", [1.0, 0.2])
def test_its_paths_are_tested_before_it_is_left_at_that(share: float) -> None:
    job, inquiry = Job(), Inquiry()
    inquiry.ingest(WorldChanged(world=world(SIZE), at=0.0))
    job.play(20, {})
    said: list[Verdict] = []

    def rate(a: Seat, b: Seat, now: float) -> float:
        return 1e8 * (share if now > 20.0 and {int(a), int(b)} == {0, 2} else 1.0)

    for now in [0.5 * n for n in range(2, 24)] + [30.0 + 0.5 * n for n in range(30)]:
        causes = job.play(0.5, {21: 0.05}) if now > 20 else []
        said = inquiry.tick(now, causes)
        for order in inquiry.orders():
            for a, b in ((order.a, order.b), (order.b, order.a)):
                spent = (1e6 / rate(a, b, now),) * 5
                inquiry.ingest(
                    PairSeen(
                        order=order.number, sender=a, receiver=b, at=now, nbytes=1_000_000,
                        seconds=spent,
                    )
                )  # fmt: skip
    (verdict,) = said
    assert verdict.fault is Fault.SLOW_COMM
    assert verdict.evidence.get("where") == (None if share == 1.0 else "link")
    assert verdict.peer == (None if share == 1.0 else 2)


def test_one_that_stands_in_line_has_not_begun() -> None:
    def record(seq: int, enter: float, leave: float, group: int = 0) -> OpRecord:
        return OpRecord(
            member=MemberId(1), generation=Generation(1), group=group, seq=seq, op="all_reduce",
            nbytes=8 * seq, t_enter_ns=int(enter * 1e9), t_leave_ns=int(leave * 1e9), ok=True,
        )  # fmt: skip

    line = [record(3, 1.0, 2.0), record(4, 1.25, 2.5), record(4, 1.5, 4.0, group=5)]
    mine, other = NodeOps().take(Seat(0), line)
    assert (mine.spent_s, mine.nbytes) == ([0.5], [32])
    assert other.spent_s == [2.5], "of another group"
