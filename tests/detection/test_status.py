"""Rows and rings: what is written is read, whole, whatever happens to the writer."""

import errno
import itertools
import multiprocessing as mp
import os
import time
from pathlib import Path

import pytest

from ftkit.core.errors import CapacityError, IntegrityError, ProtocolError
from ftkit.core.ids import Generation, MemberId
from ftkit.detection.observations import ProcessFacts
from ftkit.detection.ring import RING_RECORDS
from ftkit.detection.row import ROW_BYTES, WARM, OpRecord, Phase, Row
from ftkit.detection.seat_writer import NOWHERE, SeatWriter
from ftkit.detection.status import StatusBoard
from tests.detection.scene import facts, row


@pytest.fixture
def board(tmp_path):
    with StatusBoard.create(tmp_path / "board", seats=3) as board:
        yield board


def fill(writer: SeatWriter, n: int) -> None:
    """Every field a function of `n`, so that a mixed row shows."""
    writer.generation = writer.step = n
    writer.flags = WARM * (n & 1)
    writer.publish(n + 1)


def check(found: Row | None) -> int:
    assert found is not None
    n = int(found.step)
    assert (found.generation, found.t_progress_ns, found.warm) == (n, n + 1, bool(n & 1))
    assert found.entered in (-1, n)
    assert found.t_enter_ns in (0, n)
    return n


def test_what_is_written_is_read(board) -> None:
    assert board.read(1) is None
    writer = board.attach(1, MemberId(7), pid=42)
    first = board.read(1)
    assert (first.member, first.pid, first.phase, first.entered) == (7, 42, Phase.STARTING, -1)
    writer.phase = Phase.VOTE
    fill(writer, 2**31)
    writer.beat(11)
    writer.allow(12_000_000)
    found = board.read(1)
    assert check(found) == 2**31
    assert (found.phase, found.t_heartbeat_ns, found.allowance_ns) == (Phase.VOTE, 11, 12_000_000)
    assert board.read(0) is None
    assert board.read(2) is None


def test_the_file_is_private_and_all_allocated(board) -> None:
    found = os.stat(board.path)
    assert found.st_mode & 0o777 == 0o600
    assert found.st_blocks * 512 >= found.st_size


def test_a_new_member_takes_the_seat_whole(board) -> None:
    old = board.attach(0, MemberId(1))
    fill(old, 5)
    old.beat(9)
    old.record_enter(0, 1, b"broadcast", 4, 8)
    board.attach(0, MemberId(2))
    found = board.read(0)
    assert (found.member, found.step, found.t_heartbeat_ns) == (2, 0, 0)
    assert [r.member for r in board.records(0)] == [1]
    # The old one wakes up and writes on: refused, never taken for the new one's.
    fill(old, 6)
    with pytest.raises(IntegrityError, match="two processes"):
        board.read(0)


def test_a_writer_killed_on_any_line_leaves_the_row_before(board) -> None:
    writer = board.attach(0, MemberId(1))
    for n in (5, 6):
        fill(writer, n)
        writer.step = 99
        writer._fill(99)  # filled the other copy, died before the word that publishes
        assert check(board.read(0)) == n


@pytest.mark.parametrize("byte", [*range(16), *range(24, 56)])
def test_a_flipped_byte_is_never_a_row(tmp_path, byte) -> None:
    with StatusBoard.create(tmp_path / "board", seats=1) as board:
        writer = board.attach(0, MemberId(1), pid=3)
        fill(writer, 5)  # the second publication: copy 0
        fill(writer, 6)
        fill(writer, 7)
        data = board._bytes
        data[ROW_BYTES + byte] ^= 0x40
        if byte < 32 or board._words[ROW_BYTES // 8] % 2 == 0:
            with pytest.raises(IntegrityError, match="seat 0"):
                board.read(0)
        else:
            pytest.fail("copy 0 is not the published one: the test flips in vain")


def test_a_board_is_opened_only_when_it_is_one(tmp_path, board) -> None:
    writer = board.attach(2, MemberId(4))
    fill(writer, 1)
    with StatusBoard.open(board.path) as other:
        assert check(other.read(2)) == 1
    with pytest.raises(FileExistsError):
        StatusBoard.create(board.path, seats=3)
    data = board.path.read_bytes()
    bad = tmp_path / "bad"
    for content, text in [
        (b"", "not a status board"),
        (b"\0" * len(data), "never finished"),
        (data[:-1], "has"),
        (data[:8] + b"\2" + data[9:], "format 2"),
    ]:
        bad.write_bytes(content)
        with pytest.raises(IntegrityError, match=text):
            StatusBoard.open(bad)


def test_no_room_is_said_at_creation_and_leaves_nothing(tmp_path, monkeypatch) -> None:
    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(CapacityError, match="142016 bytes"):
        StatusBoard.create(tmp_path / "board", seats=3)
    assert not (tmp_path / "board").exists()


@pytest.mark.parametrize("seats", [0, 4097])
def test_seats_are_bounded(tmp_path, seats) -> None:
    with pytest.raises(ValueError, match=str(seats)):
        StatusBoard.create(tmp_path / "board", seats=seats)


def test_a_seat_that_is_not_there(board) -> None:
    with pytest.raises(ValueError, match="seat 3"):
        board.read(3)


def test_the_ring_keeps_the_last_256(board) -> None:
    writer = board.attach(0, MemberId(1))
    for n in range(RING_RECORDS + 44):
        place = writer.record_enter(1, n, b"all_gather_into_tensor", n, 100 + n)
        writer.record_leave(place, 1000 + n, n != 51)
    records = board.records(0)
    assert records[-3:] == board.records(0, 3)
    assert [r.seq for r in records] == list(range(44, RING_RECORDS + 44))
    assert records[6] == OpRecord(
        member=MemberId(1),
        generation=Generation(0),
        group=1,
        seq=50,
        op="all_gather_into_tensor",
        nbytes=50,
        t_enter_ns=150,
        t_leave_ns=1050,
        ok=True,
    )
    assert (records[7].t_leave_ns, records[7].ok) == (1051, False)


def test_what_is_pending_is_never_written_over(board) -> None:
    writer = board.attach(0, MemberId(1))
    first = writer.record_enter(1, 7, b"all_reduce", 4, 5)
    for n in range(2 * RING_RECORDS):
        writer.record_leave(writer.record_enter(2, n, b"barrier", 0, 10 + n), 11 + n, True)
    found = board.read(0)
    assert (found.group, found.entered, found.left, found.op) == (1, 7, 6, "all_reduce")
    assert (found.t_enter_ns, found.t_progress_ns) == (5, 10 + 2 * RING_RECORDS)
    writer.record_leave(first, 10_000, True)
    found = board.read(0)
    assert (found.group, found.entered, found.left, found.t_enter_ns) == (1, 7, 7, 0)
    assert found.t_progress_ns == 10_000


def test_of_more_in_flight_than_there_is_room_for_the_oldest_are_told(board) -> None:
    writer = board.attach(0, MemberId(1))
    places = [writer.record_enter(0, n, b"barrier", 0, 1 + n) for n in range(RING_RECORDS)]
    assert writer.record_enter(0, RING_RECORDS, b"barrier", 0, 999) == NOWHERE
    writer.record_leave(NOWHERE, 1000, True)
    assert (board.read(0).left, board.read(0).entered) == (-1, RING_RECORDS - 1)
    writer.record_leave(places[9], 1001, True)
    assert writer.record_enter(0, RING_RECORDS + 1, b"barrier", 0, 1002) == places[9]


def test_a_torn_record_is_left_out(board) -> None:
    writer = board.attach(0, MemberId(1))
    places = [writer.record_enter(0, n, b"barrier", 0, n + 1) for n in range(3)]
    for place in places[:2]:
        writer.record_leave(place, 10, True)
    for torn, still in ((1, [0, 2]), (2, [0])):
        board._bytes[board._place(0).ring + torn * 96 + 16] ^= 1
        assert [r.seq for r in board.records(0)] == still
    # Of the whole ones the row is made: the torn one may be on its way.
    assert (board.read(0).entered, board.read(0).t_enter_ns) == (0, 0)


def test_rows_and_facts_travel_as_json() -> None:
    for found in (row(7, pending_since=3.0, phase=Phase.VOTE), row(8, warm=False)):
        assert Row.from_json(found.to_json()) == found
    assert ProcessFacts.from_json(facts("T").to_json()) == facts("T")
    bad: object
    for bad in (None, {}, row(7).to_json() | {"phase": "lunch"}, row(7).to_json() | {"pid": None}):
        with pytest.raises(ProtocolError):
            Row.from_json(bad)
    with pytest.raises(ProtocolError):
        ProcessFacts.from_json({"state": "S"})


def test_shifting_keeps_ages_and_what_never_was() -> None:
    found = row(7, moved=5.0, pending_since=4.0).shifted(10**9)
    assert (found.t_progress_ns, found.t_enter_ns) == (6 * 10**9, 5 * 10**9)
    assert (found.t_heartbeat_ns, found.allowance_ns) == (0, 0)


def hammer(path: Path) -> None:
    with StatusBoard.open(path) as board:
        writer = board.attach(0, MemberId(9))
        for n in itertools.count(1):
            fill(writer, n)
            writer.beat(n)
            writer.record_leave(writer.record_enter(0, n, b"barrier", n, n), n + 1, True)


@pytest.mark.multiproc
def test_a_hammering_writer_never_shows_a_torn_row(board) -> None:
    process = mp.get_context("spawn").Process(target=hammer, args=(board.path,), daemon=True)
    process.start()
    try:
        deadline = time.monotonic() + 30
        while board.read(0) is None:
            assert time.monotonic() < deadline, "the writer never attached"
        seen, last = set[int](), 0
        while len(seen) < 1000:
            assert time.monotonic() < deadline, f"only {len(seen)} different rows in 30 s"
            n = check(board.read(0)) if last else int(board.read(0).step)
            assert n >= last, "a row went back in time"
            seen.add(n)
            last = n
    finally:
        process.kill()
        process.join(10)
    # The row outlives the process that was killed somewhere in the middle.
    assert check(board.read(0)) >= last
    assert board.read(0).member == 9
