"""A process is known by its number and its start; it is stopped once all its threads are."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ftkit.core.process_stat import all_stopped, start_ticks

pytestmark = pytest.mark.multiproc


def test_a_process_keeps_its_start_and_another_has_another() -> None:
    mine = start_ticks(os.getpid())
    assert mine is not None
    uptime_s = float(Path("/proc/uptime").read_text().split()[0])
    assert 0 < mine <= uptime_s * os.sysconf("SC_CLK_TCK")
    time.sleep(2 / os.sysconf("SC_CLK_TCK"))
    with subprocess.Popen(["sleep", "60"]) as child:
        later = start_ticks(child.pid)
        assert later is not None
        assert later > mine
        child.kill()
        while start_ticks(child.pid) is not None:
            time.sleep(0.01)
        assert child.returncode is None, "a zombie, whom nobody has asked for its end"
    assert start_ticks(child.pid) is None


THREADS = """
import threading
for _ in range(3):
    threading.Thread(target=threading.Event().wait, daemon=True).start()
print(flush=True)
while True:
    pass
"""


@pytest.fixture
def busy() -> Iterator[subprocess.Popen[bytes]]:
    """A process of four threads, of which one computes."""
    with subprocess.Popen([sys.executable, "-c", THREADS], stdout=subprocess.PIPE) as child:
        try:
            assert child.stdout is not None
            child.stdout.readline()
            yield child
        finally:
            child.kill()


def test_it_is_stopped_once_all_its_threads_are(busy: subprocess.Popen[bytes]) -> None:
    assert not all_stopped(busy.pid)
    busy.send_signal(signal.SIGSTOP)
    while not all_stopped(busy.pid):
        time.sleep(0.001)
    letters = [
        (task / "stat").read_text().rpartition(")")[2].split()[0]
        for task in Path(f"/proc/{busy.pid}/task").iterdir()
    ]
    assert letters == ["T"] * 4
    busy.send_signal(signal.SIGCONT)
    while all_stopped(busy.pid):
        time.sleep(0.001)
    busy.kill()
    busy.wait()
    assert all_stopped(busy.pid), "it is gone"
