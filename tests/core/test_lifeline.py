"""Lifelines: an exit is told before the process has freed its memory, and nothing else is."""

import json
import os
import queue
import select
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from ftkit.core import lifeline
from ftkit.core.lifeline_watch import LifelineWatch, exiting

pytestmark = [
    pytest.mark.multiproc,
    pytest.mark.skipif(not lifeline.supported(), reason="another C library or machine"),
]

PROGRAM = """
import json, os, sys, threading
from ftkit.core import lifeline
memory = bytearray(b"x") * int(sys.argv[1])
print(json.dumps(lifeline.own()._asdict()), flush=True)
for line in sys.stdin:
    exec(line)
"""


class Process:
    """A process with a lifeline, which runs the lines that it is given."""

    def __init__(self, nbytes: int = 1) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(nbytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.popen.stdin
        assert self.popen.stdout
        self._in, self.out = self.popen.stdin, self.popen.stdout
        self.told = json.loads(self.out.readline())

    def do(self, line: str) -> None:
        self._in.write(line + "\n")
        self._in.flush()

    def end(self) -> None:
        self.popen.kill()
        self.popen.wait()
        self._in.close()
        self.out.close()


@pytest.fixture
def process() -> Iterator[Process]:
    process = Process()
    yield process
    process.end()


@pytest.fixture
def watch() -> Iterator[LifelineWatch]:
    watch = LifelineWatch()
    yield watch
    watch.close()


Told = queue.SimpleQueue[int | None]


def test_a_killed_process_is_told_of_while_it_still_holds_its_memory(watch: LifelineWatch) -> None:
    process = Process(512 << 20)
    pidfd = os.pidfd_open(process.popen.pid)
    told: queue.SimpleQueue[tuple[int | None, bool]] = queue.SimpleQueue()

    def note(code: int | None) -> None:
        told.put((code, bool(select.select([pidfd], [], [], 0)[0])))

    assert watch.watch(process.told, note) is not None
    process.popen.kill()
    assert told.get(timeout=10) == (-signal.SIGKILL, False)
    process.end()
    os.close(pidfd)


@pytest.mark.parametrize(("line", "code"), [("sys.exit(3)", 3), ("os.abort()", -signal.SIGABRT)])
def test_the_exit_code_is_told(
    process: Process, watch: LifelineWatch, line: str, code: int
) -> None:
    told = Told()
    watch.watch(process.told, told.put)
    process.do(line)
    assert told.get(timeout=10) == code


def test_one_that_stands_still_is_not_gone(process: Process, watch: LifelineWatch) -> None:
    told = Told()
    watch.watch(process.told, told.put)
    process.popen.send_signal(signal.SIGSTOP)
    with pytest.raises(queue.Empty):
        told.get(timeout=0.2)
    process.popen.kill()
    assert told.get(timeout=10) == -signal.SIGKILL


def test_a_child_that_lives_on_does_not_hide_the_end(
    process: Process, watch: LifelineWatch
) -> None:
    told = Told()
    watch.watch(process.told, told.put)
    process.do("print(os.fork() or os.read(0, 1) and 0, flush=True)")
    child = int(process.out.readline())
    process.popen.kill()
    try:
        assert told.get(timeout=10) == -signal.SIGKILL
        assert not exiting(child)
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_forked_child_has_one_of_its_own(process: Process) -> None:
    process.do("if not os.fork(): print(json.dumps(lifeline.own()._asdict()), flush=True)")
    child = json.loads(process.out.readline())
    assert child["pid"] != process.told["pid"]
    assert child["serial"] != process.told["serial"]
    os.kill(child["pid"], signal.SIGKILL)


def test_all_who_watch_are_told(process: Process) -> None:
    told = Told()
    watches = [LifelineWatch() for _ in range(3)]
    for watch in watches:  # at one place, where the kernel wakes only one
        assert watch.watch(process.told, told.put) is not None
    process.popen.kill()
    assert [told.get(timeout=10) for _ in watches] == [-signal.SIGKILL] * 3
    for watch in watches:
        watch.close()


def test_whom_one_forgot_nobody_hears_of(process: Process, watch: LifelineWatch) -> None:
    forgotten, told = Told(), Told()
    ticket = watch.watch(process.told, forgotten.put)
    watch.watch(process.told, told.put)
    watch.forget(ticket)
    watch.forget(ticket)
    watch.forget(None)
    process.popen.kill()
    assert told.get(timeout=10) == -signal.SIGKILL
    assert forgotten.empty()


def test_one_that_is_gone_cannot_be_watched(process: Process, watch: LifelineWatch) -> None:
    process.end()
    assert watch.watch(process.told, Told().put) is None


@pytest.mark.parametrize(
    "change",
    [
        {"nonce": "00" * 16},
        {"nonce": 7},
        {"serial": 1},
        {"fd": 0},
        {"fd": -1},
        {"fd": True},
        {"pid": 1 << 30},
        {"pid": "self"},
        {"pid": None},
    ],
)
def test_what_is_not_a_lifeline_is_refused(watch: LifelineWatch, change: dict[str, object]) -> None:
    told = lifeline.own()
    assert told is not None
    assert watch.watch(told._asdict(), Told().put) is not None
    assert watch.watch(told._asdict() | change, Told().put) is None


@pytest.mark.parametrize("told", [None, {}, [], "x", [1, 2, 3], 5, {"pid": 1}])
def test_nonsense_is_refused(watch: LifelineWatch, told: object) -> None:
    assert watch.watch(told, Told().put) is None


def test_a_closed_watch_watches_nobody(process: Process) -> None:
    watch = LifelineWatch()
    watch.close()
    watch.close()
    assert watch.watch(process.told, Told().put) is None
