"""Exits: whether a process that ended ran out of memory. Pure.

The kernel's OOM killer ends a process by SIGKILL like anybody else, and counts it; a limit of
the process's own (RLIMIT_AS, a GPU's memory) raises an exception, whose name is the last thing
that it says.
"""

import signal
from typing import Final

#: What a shell, or a container, makes of a child that was killed.
_KILLED: Final = 128 + signal.SIGKILL

#: How allocators say it: Python, torch on the CPU and on CUDA, C++, fork and mmap.
_SAYINGS: Final = (
    "MemoryError",
    "OutOfMemoryError",
    "out of memory",
    "bad_alloc",
    "can't allocate memory",
    "Cannot allocate memory",
)

#: Of a rank's last words so many lines are looked at: further up stands what it survived.
_LINES: Final = 3


def out_of_memory(
    *, code: int | None, killed_by: int | None, ours: bool, kills: str, said: str
) -> str:
    """Why this end is taken for lack of memory; "" when nothing speaks for it.

    Args:
      code: the exit code, None when it ended by a signal.
      killed_by: the signal.
      ours: whether ftkit killed it itself.
      kills: what the kernel's counters say of its OOM killer lately; "" when it has not struck.
      said: the exception that ended it, or the last lines that it wrote; "" when unknown.
    """
    if ours:
        return ""
    if kills and (killed_by == signal.SIGKILL or code == _KILLED):
        return kills
    if code == 0:
        return ""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    for line in reversed(lines[-_LINES:]):
        if any(saying in line for saying in _SAYINGS):
            return f"its last words are {line[:300]!r}"
    return ""
