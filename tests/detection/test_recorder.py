"""The recorder: what the loop and the collectives report is what the row shows."""

import threading
import time

import pytest

from ftkit.core.clock import ManualClock, MonotonicClock
from ftkit.core.ids import Generation, MemberId, Step
from ftkit.detection.recorder import Recorder
from ftkit.detection.row import Phase
from ftkit.detection.status import StatusBoard


@pytest.fixture
def board(tmp_path):
    with StatusBoard.create(tmp_path / "board", seats=1) as board:
        yield board


@pytest.fixture
def clock():
    return ManualClock(10.0)


@pytest.fixture
def recorder(board, clock):
    with Recorder(board.attach(0, MemberId(1)), clock) as recorder:
        yield recorder


def s(seconds: float) -> int:
    return int(seconds * 1e9)


def test_phases_and_steps_are_progress(board, clock, recorder) -> None:
    assert board.read(0).t_progress_ns == s(10)
    clock.advance(1)
    recorder.adopt(Generation(4))
    recorder.phase(Phase.SETUP)
    clock.advance(1)
    recorder.step(Step(8))
    recorder.phase(Phase.DATA)
    row = board.read(0)
    assert (row.generation, row.step, row.phase, row.t_progress_ns) == (4, 8, Phase.DATA, s(12))
    assert not row.warm


def test_warm_after_the_first_step_and_not_by_playing_it_again(board, recorder) -> None:
    for _ in range(3):
        recorder.step(Step(8))
        assert not board.read(0).warm
    recorder.step(Step(9))
    assert board.read(0).warm
    recorder.adopt(Generation(2))
    assert board.read(0).warm


def test_a_collective_is_pending_from_enter_to_leave(board, clock, recorder) -> None:
    recorder.enter(0, 1, "all_reduce", 64)
    row = board.read(0)
    assert (row.entered, row.left, row.op, row.t_enter_ns) == (1, 0, "all_reduce", s(10))
    clock.advance(2)
    recorder.leave(0, 1, True)
    row = board.read(0)
    assert (row.entered, row.left, row.t_enter_ns, row.t_progress_ns) == (1, 1, 0, s(12))
    (record,) = board.records(0)
    assert (record.op, record.nbytes, record.t_enter_ns, record.t_leave_ns, record.ok) == (
        "all_reduce",
        64,
        s(10),
        s(12),
        True,
    )


def test_the_row_shows_the_oldest_pending(board, clock, recorder) -> None:
    for seq in (1, 2, 3):
        recorder.enter(0, seq, "all_reduce", 1)
        clock.advance(1)
    row = board.read(0)
    assert (row.entered, row.left, row.t_enter_ns) == (3, 0, s(10))
    recorder.leave(0, 2, True)  # out of order: 1 is still waited for
    assert board.read(0).left == 0
    recorder.leave(0, 1, True)
    row = board.read(0)
    assert (row.entered, row.left, row.t_enter_ns) == (3, 2, s(12))


def test_groups_are_kept_apart(board, recorder) -> None:
    recorder.enter(1, 5, "all_gather", 1)
    recorder.enter(2, 5, "reduce_scatter", 1)
    row = board.read(0)
    assert (row.group, row.entered, row.op) == (1, 5, "all_gather")
    recorder.leave(1, 5, True)
    row = board.read(0)
    assert (row.group, row.entered, row.left, row.op) == (2, 5, 4, "reduce_scatter")
    recorder.leave(2, 5, True)
    assert board.read(0).t_enter_ns == 0


def test_seqs_may_begin_at_zero(board, recorder) -> None:
    recorder.enter(0, 0, "barrier", 0)
    row = board.read(0)
    assert (row.entered, row.left, row.t_enter_ns) == (0, -1, s(10))


def test_a_new_generation_ends_what_was_pending(board, recorder) -> None:
    recorder.enter(0, 1, "all_reduce", 1)
    recorder.adopt(Generation(2))
    row = board.read(0)
    assert (row.entered, row.left, row.t_enter_ns, row.op) == (-1, -1, 0, "")
    assert [(r.ok, r.t_leave_ns) for r in board.records(0)] == [(False, s(10))]
    recorder.enter(0, 1, "all_reduce", 1)
    recorder.leave(0, 7, False)  # a late answer from the generation before
    assert board.read(0).t_enter_ns == s(10)


def test_allowances(board, recorder) -> None:
    with recorder.allowed(30):
        assert board.read(0).allowance_ns == s(40)
        with recorder.allowed(60):
            assert board.read(0).allowance_ns == s(70)
        with recorder.allowed(5):
            assert board.read(0).allowance_ns == s(40)
        assert board.read(0).allowance_ns == s(40)
    assert board.read(0).allowance_ns == 0
    for bad in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="allowance"), recorder.allowed(bad):
            pass


def test_the_heartbeat_beats_alone_and_ends_with_close(board) -> None:
    recorder = Recorder(board.attach(0, MemberId(1)), MonotonicClock(), heartbeat_interval_s=0.005)
    first = board.read(0)
    assert first.t_heartbeat_ns > 0
    deadline = time.monotonic() + 10
    while board.read(0).t_heartbeat_ns == first.t_heartbeat_ns:
        assert time.monotonic() < deadline, "no heartbeat in 10 s"
    assert board.read(0).t_progress_ns == first.t_progress_ns
    recorder.close()
    recorder.close()
    assert "ftkit-heartbeat" not in {t.name for t in threading.enumerate()}
    with pytest.raises(ValueError, match="heartbeat_interval_s"):
        Recorder(board.attach(0, MemberId(1)), MonotonicClock(), heartbeat_interval_s=0)


def test_a_late_report_after_close_changes_nothing_and_does_not_raise(tmp_path) -> None:
    board = StatusBoard.create(tmp_path / "late", seats=1)
    recorder = Recorder(board.attach(0, MemberId(1)), MonotonicClock())
    recorder.enter(0, 1, "all_reduce", 1)
    recorder.close()
    before = board.read(0)
    recorder.leave(0, 1, False)
    assert board.read(0) == before
    board.close()
    recorder.adopt(Generation(2))
    recorder.phase(Phase.DONE)
    recorder.step(Step(2))
    recorder.enter(0, 2, "all_reduce", 1)
    with recorder.allowed(5):
        pass


def test_many_threads_leave_one_whole_row(board) -> None:
    recorder = Recorder(board.attach(0, MemberId(1)), MonotonicClock())

    def work(group: int) -> None:
        for seq in range(1, 301):
            recorder.enter(group, seq, "all_reduce", 1)
            recorder.leave(group, seq, True)

    threads = [threading.Thread(target=work, args=(group,)) for group in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    row = board.read(0)
    assert (row.entered, row.left, row.t_enter_ns) == (300, 300, 0)
    assert all(r.ok for r in board.records(0))
