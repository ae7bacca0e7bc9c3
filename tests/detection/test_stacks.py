"""A rank's stacks come without its help, and nobody is harmed by being asked."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ftkit.core.ids import MemberId
from ftkit.detection import stacks, thread_stacks

RANK = """
import sys, re, time, threading
from pathlib import Path
from ftkit.core.ids import MemberId
from ftkit.detection import stacks

def blocked():
    lock = threading.Lock()
    lock.acquire()
    print("there", flush=True)
    lock.acquire()

def busy():
    print("there", flush=True)
    re.match(r"(a+)+$", "a" * 60 + "b")

def threads():
    def work(depth):
        return depth and work(depth - 1) + len(sorted(range(9), key=lambda n: -n))

    def run():
        while True:
            work(50)

    for i in range(2):
        threading.Thread(target=run, name=f"loader-{i}", daemon=True).start()
    print("there", flush=True)
    while True:
        time.sleep(0.001)

with stacks.answering(Path(sys.argv[2]), MemberId(7)):
    globals()[sys.argv[1]]()
"""


@pytest.fixture
def rank(tmp_path: Path, request: pytest.FixtureRequest):
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    process = subprocess.Popen(
        [sys.executable, str(script), request.param, str(tmp_path)], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.mark.multiproc
@pytest.mark.parametrize(("rank", "frame"), [("blocked",) * 2, ("busy",) * 2], indirect=["rank"])
def test_who_is_blocked_or_keeps_the_interpreter_shows_where(rank, frame, tmp_path: Path) -> None:
    file = stacks.path(tmp_path, MemberId(7))
    frames = stacks.innermost(stacks.ask(rank.pid, file, limit_s=10.0))
    assert any(f.startswith(f"{frame} at ") for f in frames), frames
    assert stacks.users(frames).startswith(frame)
    # Asked again, it answers again, and only the new answer is given.
    again = stacks.ask(rank.pid, file, limit_s=10.0)
    assert again.count("most recent call first") == 1
    assert any(f.startswith(f"{frame} at ") for f in stacks.innermost(again)), again
    assert rank.poll() is None


@pytest.mark.multiproc
@pytest.mark.parametrize("rank", ["threads"], indirect=True)
def test_a_healthy_one_with_busy_threads_outlives_a_thousand_dumps(rank, tmp_path: Path) -> None:
    for _ in range(1000):
        stacks.interrupt(rank.pid)
        time.sleep(0.001)  # a signal that is pending already comes once
    assert rank.poll() is None
    frames = stacks.innermost(stacks.ask(rank.pid, stacks.path(tmp_path, MemberId(7))))
    assert any(f.startswith("threads at ") for f in frames), frames


@pytest.mark.multiproc
@pytest.mark.parametrize("rank", ["threads"], indirect=True)
def test_a_busy_rank_tells_of_all_its_threads(rank, tmp_path: Path) -> None:
    for _ in range(200):
        told = thread_stacks.ask(tmp_path, MemberId(7), limit_s=10.0)
        main, *others = told.split("\n\n")
        assert main.startswith("Main thread 0x"), told
        assert '"MainThread" (most recent call first):' in main
        assert " in threads\n" in main
        assert ['"loader-0"' in others[0], '"loader-1"' in others[1]] == [True] * 2, told
        assert all(" in run\n" in other or "  ..." in other for other in others), told
    assert len(others) == 2, "the one that answers is left out"
    assert any(f.startswith("threads at ") for f in stacks.innermost(told)), told
    assert '"loader-1"' in stacks.look(rank.pid, tmp_path, MemberId(7), limit_s=10.0)
    assert rank.poll() is None


@pytest.mark.multiproc
@pytest.mark.parametrize("rank", ["busy"], indirect=True)
def test_who_keeps_the_interpreter_says_nothing(rank, tmp_path: Path) -> None:
    limit = time.monotonic() + 20.0
    while thread_stacks.ask(tmp_path, MemberId(7), limit_s=0.2):
        assert time.monotonic() < limit, "it is on its way there"
    # Then what is known is what its main thread does.
    told = stacks.look(rank.pid, tmp_path, MemberId(7), limit_s=0.5)
    assert any(f.startswith("busy at ") for f in stacks.innermost(told)), told


def test_nobody_there_is_no_answer_and_no_room_for_a_socket_no_error(tmp_path: Path) -> None:
    assert thread_stacks.ask(tmp_path, MemberId(7)) == ""
    deep = tmp_path / ("x" * 100)  # names of sockets are short
    deep.mkdir()
    with stacks.answering(deep, MemberId(7)):
        assert thread_stacks.ask(deep, MemberId(7)) == ""
    with thread_stacks.answering(tmp_path, MemberId(7)):
        assert "in test_nobody_there" in thread_stacks.ask(tmp_path, MemberId(7), limit_s=10.0)
    assert thread_stacks.ask(tmp_path, MemberId(7)) == ""
    assert not thread_stacks.path(tmp_path, MemberId(7)).exists()


def test_recursion_does_not_crowd_others_out() -> None:
    ready, done = threading.Event(), threading.Event()

    def dive(depth: int) -> None:
        if depth:
            dive(depth - 1)
        else:
            ready.set()
            done.wait()

    deep = threading.Thread(target=dive, args=(300,), name="deep")
    deep.start()
    ready.wait()
    try:
        (told,) = (t for t in thread_stacks.current().split("\n\n") if '"deep"' in t)
    finally:
        done.set()
        deep.join()
    assert told.count(" in dive\n") < thread_stacks.FRAMES_MAX
    assert told.count("\n") <= thread_stacks.FRAMES_MAX + 2
    assert "  ..." in told


@pytest.mark.multiproc
@pytest.mark.parametrize("rank", ["blocked"], indirect=True)
def test_a_stopped_one_is_left_alone(rank, tmp_path: Path) -> None:
    os.kill(rank.pid, signal.SIGSTOP)
    while Path(f"/proc/{rank.pid}/stat").read_text().split()[2] != "T":
        time.sleep(0.01)
    assert stacks.ask(rank.pid, stacks.path(tmp_path, MemberId(7))) == ""
    os.kill(rank.pid, signal.SIGCONT)
    assert rank.poll() is None


@pytest.mark.multiproc
def test_who_does_not_answer_is_not_asked(tmp_path: Path) -> None:
    with subprocess.Popen(["/bin/sleep", "60"]) as other:
        assert not stacks.answers(other.pid)
        assert stacks.ask(other.pid, tmp_path / "none") == ""
        assert other.poll() is None
        other.kill()
    assert not stacks.answers(other.pid)


def test_the_innermost_frames_are_those_of_the_interrupted_thread() -> None:
    text = """Thread 0x01 (most recent call first):
  File "/x/threading.py", line 3 in wait
Current thread 0x02 (most recent call first):
  File "/usr/lib/python3.11/queue.py", line 9 in get
  File "/home/me/train.py", line 12 in forward
"""
    assert stacks.innermost(text) == [
        "get at /usr/lib/python3.11/queue.py:9",
        "forward at /home/me/train.py:12",
    ]
    assert stacks.users(stacks.innermost(text)) == "forward at /home/me/train.py:12"
    assert stacks.innermost("garbage") == []
    assert stacks.users([]) == ""
