"""Steps in shared memory: where the time went is what the record says, whole or not at all."""

import math
from dataclasses import replace

import pytest

from ftkit.core.clock import ManualClock
from ftkit.core.ids import Generation, MemberId, Seat, Step
from ftkit.detection.meter import Gauges
from ftkit.detection.recorder import Recorder
from ftkit.detection.row import Phase
from ftkit.detection.signals import from_json, to_json
from ftkit.detection.status import StatusBoard
from ftkit.detection.step_record import STEP_BYTES, STEPS_KEPT, StepRecord

MEMBER = MemberId(7)


@pytest.fixture
def board(tmp_path):
    with StatusBoard.create(tmp_path / "board", seats=2) as board:
        yield board


class Process:
    """A recorder on a manual clock, and the gauges of a process that a test turns by hand."""

    def __init__(self, board: StatusBoard) -> None:
        self.clock = ManualClock(10.0)
        self.blocked = self.cpu = self.gc = 0.0
        self.recorder = Recorder(
            board.attach(1, MEMBER),
            self.clock,
            gauges=Gauges(
                blocked_s=lambda: self.blocked, cpu_s=lambda: self.cpu, gc_s=lambda: self.gc
            ),
        )

    def spend(self, phase: Phase, seconds: float, *, blocked: float = 0.0) -> None:
        self.recorder.phase(phase)
        self.clock.advance(seconds)
        self.blocked += blocked

    def play(self, step: int) -> None:
        self.recorder.step(Step(step))
        self.spend(Phase.FORWARD, 0.1)
        self.recorder.finish(slots=1)


@pytest.fixture
def process(board):
    process = Process(board)
    with process.recorder:
        yield process


def record(number: int, **changes) -> StepRecord:
    return replace(
        StepRecord(
            number=number,
            member=MEMBER,
            generation=Generation(1),
            step=Step(number),
            t_end_ns=1 + number,
        ),
        **changes,
    )


def test_the_time_goes_to_the_phase_it_was_spent_in(board, process) -> None:
    process.recorder.adopt(Generation(3))
    process.recorder.describe(role="pp=1", place="dp=0 pp=1")
    process.spend(Phase.BETWEEN, 1.0)
    process.recorder.step(Step(5))
    process.spend(Phase.DATA, 0.25)
    process.spend(Phase.FORWARD, 2.0, blocked=0.5)
    process.spend(Phase.DATA, 0.25)
    process.spend(Phase.REDUCE, 1.0, blocked=1.0)
    process.cpu, process.gc = 1.75, 0.125
    process.recorder.finish(slots=2, loss=0.5)
    (found,) = board.steps(1, member=MEMBER)
    assert found.seconds == {Phase.BETWEEN: 1.0, Phase.DATA: 0.5, Phase.FORWARD: 1.5}
    assert (found.waited_s, found.cpu_s, found.gc_s) == (1.5, 1.75, 0.125)
    assert (found.step, found.generation, found.slots) == (5, 3, 2)
    assert (found.loss, found.grad_norm) == (0.5, None)
    seen = found.seen_at(Seat(9))
    assert (seen.role, seen.place, seen.at) == ("pp=1", "dp=0 pp=1", 14.5)
    assert from_json(to_json(seen)) == seen
    assert board.read(1).phase is Phase.BETWEEN


def test_what_comes_after_a_step_is_the_next_ones(board, process) -> None:
    process.play(1)
    process.clock.advance(3.0)
    process.cpu = 2.0
    process.play(2)
    first, second = board.steps(1, member=MEMBER)
    assert Phase.BETWEEN not in first.seconds
    assert second.seconds == {
        Phase.BETWEEN: 3.0,
        Phase.FORWARD: pytest.approx(0.1),
    }
    assert second.cpu_s == 2.0


def test_an_attempt_that_was_rolled_back_leaves_nothing(board, process) -> None:
    process.recorder.step(Step(1))
    process.spend(Phase.FORWARD, 50.0, blocked=10.0)
    process.spend(Phase.RECOVERY, 5.0)
    process.play(1)
    (found,) = board.steps(1, member=MEMBER)
    assert found.seconds == {Phase.FORWARD: pytest.approx(0.1)}
    assert found.waited_s == 0.0


def test_a_loss_that_is_no_number_is_still_a_loss(board, process) -> None:
    process.recorder.step(Step(1))
    process.recorder.finish(slots=1, loss=math.nan, grad_norm=math.inf)
    (found,) = board.steps(1, member=MEMBER)
    assert str(found.loss) == "nan"
    assert found.grad_norm == math.inf


def test_a_reader_that_keeps_up_reads_each_once(board, process) -> None:
    read: list[int] = []
    for step in range(1, 3 * STEPS_KEPT):
        process.play(step)
        if step % 50 == 0:
            after = read[-1] if read else -1
            read += [r.number for r in board.steps(1, member=MEMBER, after=after)]
    assert read == list(range(len(read)))
    assert board.steps(1, member=MEMBER, after=3 * STEPS_KEPT) == []


def test_a_reader_that_was_overtaken_goes_on_with_the_oldest_there_is(board, process) -> None:
    for step in range(1, 2 * STEPS_KEPT + 31):
        process.play(step)
    numbers = [r.number for r in board.steps(1, member=MEMBER, after=4)]
    assert numbers == list(range(STEPS_KEPT + 30, 2 * STEPS_KEPT + 30))


def test_what_a_dead_member_left_is_there_until_it_is_overwritten(board, process) -> None:
    for step in range(1, 6):
        process.play(step)
    heir = board.attach(1, MemberId(8))
    assert [r.step for r in board.steps(1, member=MEMBER, after=2)] == [4, 5]
    assert board.steps(1, member=MemberId(8)) == []
    heir.record_step(record(0, member=MemberId(8)))
    assert [r.number for r in board.steps(1, member=MemberId(8))] == [0]
    assert [r.step for r in board.steps(1, member=MEMBER, after=2)] == [4, 5]
    assert [r.step for r in board.steps(1, member=MEMBER)] == [2, 3, 4, 5]


@pytest.mark.parametrize("byte", range(0, STEP_BYTES, 5))
def test_a_torn_record_is_no_record(tmp_path, byte) -> None:
    with StatusBoard.create(tmp_path / "board", seats=1) as board:
        writer = board.attach(0, MEMBER)
        for number in range(4):
            writer.record_step(record(number))
        board._bytes[board._place(0).steps + 2 * STEP_BYTES + byte] ^= 4
        assert [r.number for r in board.steps(0, member=MEMBER)] == [0, 1, 3]


def test_a_record_of_one_seat_is_none_of_the_others(board, process) -> None:
    process.play(1)
    assert board.steps(0, member=MEMBER) == []
    with pytest.raises(ValueError, match="seat 2"):
        board.steps(2, member=MEMBER)


@pytest.mark.parametrize("role", ["x" * 17, "naïve", "a\nb"])
def test_a_role_that_does_not_fit_is_refused(process, role) -> None:
    with pytest.raises(ValueError, match="at most 16"):
        process.recorder.describe(role=role)


def test_nothing_is_recorded_after_close(board, process) -> None:
    process.recorder.step(Step(1))
    process.recorder.close()
    process.recorder.finish(slots=1)
    assert board.steps(1, member=MEMBER) == []
