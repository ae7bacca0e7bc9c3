"""Real processes: those that are dead, stopped, busy and blocked look different."""

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from ftkit.core.ids import Generation, MemberId, NodeId, Seat
from ftkit.core.verdict import Fault, Verdict
from ftkit.core.world import Member, World
from ftkit.detection.config import DetectionConfig
from ftkit.detection.detector import Detector
from ftkit.detection.observations import Exited, RowSeen, WorldChanged
from ftkit.detection.process import process_facts
from ftkit.detection.status import StatusBoard

pytestmark = pytest.mark.multiproc

SLEEP = "import time; time.sleep(60)"


@contextmanager
def child(code: str, *args: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", code, *args])
    try:
        yield process
    finally:
        process.kill()
        process.wait(10)


def eventually(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline, f"not within 20 s: {what}"
        select.select([], [], [], 0.01)


def test_facts_of_ourselves_and_of_nobody() -> None:
    mine = process_facts(os.getpid())
    assert mine is not None
    assert mine.state == "R"
    assert mine.rss_bytes > 1 << 20
    assert mine.cpu_ticks > 0
    assert mine.start_ticks > 0
    with child("pass") as process:
        process.wait(20)
        assert process_facts(process.pid) is None


def test_stopped_and_blocked_and_zombie_have_their_letters() -> None:
    def state(pid: int) -> str:
        found = process_facts(pid)
        return found.state if found else "gone"

    with child(SLEEP) as process:
        eventually(lambda: state(process.pid) == "S", "the child sleeps")
        process.send_signal(signal.SIGSTOP)
        eventually(lambda: state(process.pid) == "T", "the child is stopped")
        process.kill()
        eventually(lambda: state(process.pid) == "Z", "the child is a zombie")


RANK = """
import re, sys, time
from pathlib import Path
from ftkit.core.clock import MonotonicClock
from ftkit.core.ids import Generation, MemberId, Step
from ftkit.detection.recorder import Recorder
from ftkit.detection.row import Phase
from ftkit.detection.status import StatusBoard

path, seat, how = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
board = StatusBoard.open(path)
recorder = Recorder(board.attach(seat, MemberId(10 + seat)), MonotonicClock(), heartbeat_interval_s=0.1)
recorder.adopt(Generation(1))
for step in (1, 2, 3):
    recorder.step(Step(step))
    recorder.phase(Phase.FORWARD)
    if step == 3 and how != "wait":
        break
    recorder.phase(Phase.REDUCE)
    recorder.enter(0, step, "all_reduce", 4096)
    if step < 3:
        recorder.leave(0, step, True)
if how == "busy":
    re.match(r"(a?){40}a{40}", "a" * 40)  # holds the interpreter for hours
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("how", "fault"),
    [
        ("stop", Fault.STOPPED),
        ("busy", Fault.HANG_BUSY),
        ("block", Fault.HANG_BLOCKED),
        ("kill", Fault.EXITED),
    ],
)
def test_a_real_rank_is_named_with_its_kind(tmp_path, how, fault) -> None:
    config = DetectionConfig(max_stall_s=1.0)
    detector = Detector(config)
    members = [
        Member(member=MemberId(10 + i), seat=Seat(i), node=NodeId(0), host="127.0.0.1", port=1)
        for i in range(2)
    ]
    with (
        StatusBoard.create(tmp_path / "board", seats=2) as board,
        child(RANK, str(board.path), "0", "wait") as waiter,
        child(RANK, str(board.path), "1", how) as culprit,
    ):

        def stands() -> bool:
            first, second = board.read(0), board.read(1)
            return bool(first and second and first.entered == 3 and second.step == 3)

        eventually(stands, "both ranks reach step 3")
        if how in ("stop", "kill"):
            culprit.send_signal(signal.SIGSTOP if how == "stop" else signal.SIGKILL)
        detector.ingest(WorldChanged(world=World.of(Generation(1), members), at=time.monotonic()))
        verdicts: list[Verdict] = []
        deadline = time.monotonic() + 30
        while not verdicts:
            assert time.monotonic() < deadline, f"nobody was named within 30 s for {how}"
            time.sleep(config.tick_s)
            code = culprit.poll()
            if code is not None:
                detector.ingest(
                    Exited(
                        member=MemberId(11),
                        seat=Seat(1),
                        code=code if code >= 0 else None,
                        signal=-code if code < 0 else None,
                        at=time.monotonic(),
                    )
                )
            for seat, process in enumerate((waiter, culprit)):
                row = board.read(seat)
                assert row is not None
                at, facts = time.monotonic(), process_facts(process.pid)
                detector.ingest(
                    RowSeen(member=row.member, seat=Seat(seat), row=row, facts=facts, at=at)
                )
            verdicts = detector.tick(time.monotonic())
    assert [(v.seat, v.fault) for v in verdicts] == [(1, fault)], verdicts
    assert verdicts[0].evidence["step"] == 3
    if how != "kill":
        assert verdicts[0].evidence["waiting"] == 1
        assert "all_reduce 3 of group 0" in verdicts[0].reason
