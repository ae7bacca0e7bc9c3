"""A process is known by its number and its start, for as long as it runs."""

import os
import subprocess
import time
from pathlib import Path

from ftkit.core.process_start import start_ticks


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
