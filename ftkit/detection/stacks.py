"""Stacks: what a rank is doing, without holding it up.

A rank that can tells of all its threads itself (`thread_stacks`). One whose interpreter is kept, by
native code that does not let go of it, cannot. So every rank also has Python's faulthandler write
the stack of its main thread, the one that trains, to a file of its own when a signal comes. That
runs in C, needs no interpreter lock, and restarts what the signal interrupted. A process that is
stopped is left alone: it would do it when it wakes up, long after.

The signal goes to the main thread and to no other, and faulthandler tells of no other: threads that
run on while it walks their frames, or are interrupted as they change them, now and then ended a
healthy rank (SIGSEGV in `dump_traceback`).
"""

import ctypes
import faulthandler
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from ftkit.core.ids import MemberId
from ftkit.detection import thread_stacks

#: Not one that scripts, schedulers or torch use.
SIGNAL: Final = signal.SIGRTMIN + 9

#: Of a dump, as much as a person reads.
BYTES_MAX: Final = thread_stacks.BYTES_MAX
_POLL_S: Final = 0.005
#: A dump that has not grown for so many looks is whole.
_QUIET_LOOKS: Final = 4

_libc = ctypes.CDLL(None, use_errno=True)


def path(folder: Path, member: MemberId) -> Path:
    """Where the stacks of `member` are written, in its node's folder of shared memory."""
    return folder / f"stacks-{member}.txt"


@contextmanager
def answering(folder: Path, member: MemberId) -> Iterator[None]:
    """(in the rank) Answer to `SIGNAL` while this lasts, and to `thread_stacks.ask`.

    OSError when no file can be made.
    """
    with path(folder, member).open("a") as file, thread_stacks.answering(folder, member):
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


def look(pid: int, folder: Path, member: MemberId, *, limit_s: float = 0.5) -> str:
    """What rank `member` of this node does: all its threads, or the main one, or "".

    Blocks for a millisecond, or, where it does not answer, for twice `limit_s`.
    """
    if not answers(pid):
        return ""
    told = thread_stacks.ask(folder, member, limit_s=limit_s)
    return told or ask(pid, path(folder, member), limit_s=limit_s)


def interrupt(pid: int) -> None:
    """Send `SIGNAL` to the main thread of `pid`. OSError when there is none."""
    if _libc.tgkill(pid, pid, SIGNAL):
        raise OSError(ctypes.get_errno(), f"process {pid} takes no signal")


def ask(pid: int, file: Path, *, limit_s: float = 0.5) -> str:
    """The stack of the main thread now; "" when it cannot tell. Blocks for some ten milliseconds.

    Args:
      pid: a rank of this node.
      file: where it writes them (`path`).
      limit_s: the longest to wait.
    """
    if not answers(pid):
        return ""
    try:
        before = file.stat().st_size
        interrupt(pid)
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
    """The frames of the main thread, innermost first, as "FUNCTION at FILE:LINE".

    faulthandler calls the one that is interrupted the current one, or lists no other; else it is
    the last that is listed.
    """
    sections: list[tuple[bool, list[str]]] = []
    for line in text.splitlines():
        words = line.strip()
        if words.startswith(("Thread ", "Current thread ", "Main thread ", "Stack (")):
            sections.append((words.startswith(("Current", "Main")), []))
        elif words.startswith('File "') and sections:
            name, _, rest = words.removeprefix('File "').partition('", line ')
            number, _, function = rest.partition(" in ")
            sections[-1][1].append(f"{function} at {name}:{number}")
    chosen = [frames for main, frames in sections if main] or [s for _, s in sections]
    return chosen[-1] if chosen else []


def users(frames: list[str]) -> str:
    """The innermost frame of the user's own code; "" where there is none."""
    rooms = (f"/ftkit/{room}/" for room in ("core", "collectives", "detection", "session"))
    foreign = ("/site-packages/", "/lib/python", "<frozen", "<string>", *rooms)
    return next((f for f in frames if not any(part in f for part in foreign)), "")
