"""Stacks: what a rank's main thread is doing, without its help and without holding it up.

Every rank has Python's faulthandler write the stack of its main thread, the one that trains, to
a file of its own when a signal comes. That runs in C, needs no interpreter lock, and restarts
what the signal interrupted: it works for a thread that sleeps, waits for a lock, or keeps the
interpreter. A process that is stopped is left alone: it would do it when it wakes up, long after.

Not of the other threads: those run on while faulthandler walks their frames, and every few
hundred dumps of a healthy rank ended it (SIGSEGV in `dump_traceback`). py-spy, which reads from
outside, shows them where it is installed.
"""

import faulthandler
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from ftkit.core.ids import MemberId

#: Not one that scripts, schedulers or torch use.
SIGNAL: Final = signal.SIGRTMIN + 9

#: Of a dump, as much as a person reads.
BYTES_MAX: Final = 64 << 10
_POLL_S: Final = 0.005
#: A dump that has not grown for so many looks is whole.
_QUIET_LOOKS: Final = 4


def path(folder: Path, member: MemberId) -> Path:
    """Where the stacks of `member` are written, in its node's folder of shared memory."""
    return folder / f"stacks-{member}.txt"


@contextmanager
def answering(folder: Path, member: MemberId) -> Iterator[None]:
    """(in the rank) Answer to `SIGNAL` while this lasts. OSError when no file can be made."""
    with path(folder, member).open("a") as file:
        faulthandler.register(SIGNAL, file=file, all_threads=False, chain=False)
        try:
            yield
        finally:
            faulthandler.unregister(SIGNAL)


def answers(pid: int) -> bool:
    """Whether `pid` handles `SIGNAL` and is not stopped; others it would end, or wait for."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    caught = int(fields.get("SigCgt", "0").strip() or "0", 16)
    return bool(caught >> (SIGNAL - 1) & 1) and fields.get("State", "").strip()[:1] not in (
        *("T", "t", "Z", "X"),
    )


def ask(pid: int, file: Path, *, limit_s: float = 0.5) -> str:
    """The stacks of `pid` now; "" when it cannot tell. Blocks for some ten milliseconds.

    Args:
      pid: a rank of this node.
      file: where it writes them (`path`).
      limit_s: the longest to wait.
    """
    if not answers(pid):
        return ""
    try:
        before = file.stat().st_size
        os.kill(pid, SIGNAL)
        deadline, size, quiet = time.monotonic() + limit_s, before, 0
        while time.monotonic() < deadline and quiet < _QUIET_LOOKS:
            time.sleep(_POLL_S)
            now = file.stat().st_size
            quiet = quiet + 1 if now == size and now > before else 0
            size = now
        with file.open("rb") as dump:
            dump.seek(before)
            return dump.read(BYTES_MAX).decode(errors="replace")
    except OSError:
        return ""  # it ended meanwhile


def innermost(text: str) -> list[str]:
    """The frames of the thread that was interrupted, innermost first, as "FUNCTION at FILE:LINE".

    faulthandler calls it the current one, or lists no other; else it is the last that is listed.
    """
    sections: list[tuple[bool, list[str]]] = []
    for line in text.splitlines():
        words = line.strip()
        if words.startswith(("Thread ", "Current thread ", "Stack (")):
            sections.append((words.startswith("Current"), []))
        elif words.startswith('File "') and sections:
            name, _, rest = words.removeprefix('File "').partition('", line ')
            number, _, function = rest.partition(" in ")
            sections[-1][1].append(f"{function} at {name}:{number}")
    chosen = [frames for current, frames in sections if current] or [s for _, s in sections]
    return chosen[-1] if chosen else []


def users(frames: list[str]) -> str:
    """The innermost frame of the user's own code; "" where there is none."""
    rooms = (f"/ftkit/{room}/" for room in ("core", "collectives", "detection", "session"))
    foreign = ("/site-packages/", "/lib/python", "<frozen", "<string>", *rooms)
    return next((f for f in frames if not any(part in f for part in foreign)), "")
