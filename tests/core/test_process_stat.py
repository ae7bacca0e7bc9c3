"""A process is known by its number and its start; it stands still once all its threads do."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from ftkit.core.process_stat import stands_still, start_ticks


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


def test_it_stands_still_once_all_its_threads_are_stopped() -> None:
    command = [sys.executable, "-c", THREADS]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert not stands_still(child.pid)
        child.send_signal(signal.SIGSTOP)
        while not stands_still(child.pid):
            time.sleep(0.001)
        letters = [
            (task / "stat").read_text().rpartition(")")[2].split()[0]
            for task in Path(f"/proc/{child.pid}/task").iterdir()
        ]
        assert letters == ["T"] * 4
        child.send_signal(signal.SIGCONT)
        while stands_still(child.pid):
            time.sleep(0.001)
        child.kill()
    assert stands_still(child.pid), "it is gone"
