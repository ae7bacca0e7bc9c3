"""LifelineWatch: tells within a millisecond that a process of this host has begun to exit.

One thread waits for all of them (`futex_waitv(2)`, Linux 5.16). That a mutex was let go of says
only that a thread ended, so `/proc` is asked: a process counts as exiting when not one of its
threads can return to its program. From then on it computes and writes nothing, whatever memory
it still holds, and how it ended is known.
"""

import ctypes
import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ftkit.core import lifeline
from ftkit.core.lifeline import OWNER_DIED, PAGE_BYTES, Told, libc
from ftkit.core.process_stat import stat_fields

logger = logging.getLogger(__name__)

#: Called with the exit code, or minus the signal; None when nobody can say any more.
OnExit = Callable[[int | None], None]

_SYS_FUTEX_WAITV = 449
_WAITED_MAX = 128  # FUTEX_WAITV_MAX
_SIZE_U32, _PRIVATE = 2, 128
_WAKE = 1
_EVERYBODY = 0x7FFF_FFFF
_PF_EXITING = 4
#: So often and so far apart a process is looked at, a thread of which was let go of by the kernel.
_LOOKS, _BETWEEN_S = 100, 0.0005


class _Wait(ctypes.Structure):
    _fields_ = [
        ("value", ctypes.c_uint64),
        ("address", ctypes.c_uint64),
        ("flags", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
    ]


@dataclass(eq=False, slots=True)
class _Watched:
    pid: int
    page: int
    word: ctypes.c_uint32
    alive: int
    """What the word is while the process lives."""
    on_exit: OnExit
    forgotten: bool = False
    looks: int = 0
    """How often it was looked at since its word changed."""


class LifelineWatch:
    """See the module. Any thread may call."""

    def __init__(self) -> None:
        """Watch nobody; the thread starts with the first process."""
        self._lock = threading.Lock()
        self._watched: dict[int, _Watched] = {}
        self._next = 0
        self._changes = ctypes.c_uint32(0)
        self._thread: threading.Thread | None = None
        self._closed = False
        self._unable = not lifeline.supported()

    def watch(self, told: object, on_exit: OnExit) -> int | None:
        """Call `on_exit` once the process that told of its lifeline has begun to exit.

        Args:
          told: `lifeline.Told`, or what came of it through JSON, from whomever.
          on_exit: called on the thread of the watch, at most once. Must not block.

        Returns:
          A ticket for `forget`; None when the process cannot be watched: it is gone, on another
          host or not ours to see, or this kernel cannot.
        """
        if self._unable or (process := _told(told)) is None or (page := _map(process)) is None:
            return None
        # Processes that started near each other wait at different places.
        word = ctypes.c_uint32.from_address(lifeline.address(page, os.getpid()))
        watched = _Watched(process.pid, page, word, word.value, on_exit)
        with self._lock:
            # A word that says already that the owner died is one that will not change.
            room = len(self._watched) < _WAITED_MAX - 1 and not watched.alive & OWNER_DIED
            if self._closed or not room:
                libc.munmap(page, PAGE_BYTES)
                return None
            ticket, self._next = self._next, self._next + 1
            self._watched[ticket] = watched
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="ftkit-lifelines", daemon=True
                )
                self._thread.start()
        self._nudge()
        return ticket

    def forget(self, ticket: int | None) -> None:
        """Stop watching. A call of `on_exit` may be under way."""
        with self._lock:
            watched = self._watched.get(-1 if ticket is None else ticket)
            if watched is None:
                return
            watched.forgotten = True
        self._nudge()

    def close(self) -> None:
        """Watch nobody any more. Blocks until the thread has ended. Twice is fine."""
        with self._lock:
            self._closed = True
        self._nudge()  # after it was said, or the thread might wait for the next one
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _nudge(self) -> None:
        with self._lock:
            self._changes.value += 1
        lifeline.futex(ctypes.addressof(self._changes), _WAKE | _PRIVATE, 1)

    def _run(self) -> None:
        ending: list[_Watched] = []
        while not self._unable:
            with self._lock:
                if self._closed:
                    break
                # Read before the rest is: what changes after it ends the wait.
                changes = self._changes.value
                over = [t for t, watched in self._watched.items() if watched.forgotten]
                dropped = [self._watched.pop(ticket) for ticket in over]
                waited = list(self._watched.items())
            for watched in dropped:
                libc.munmap(watched.page, PAGE_BYTES)
            if ending:
                time.sleep(_BETWEEN_S)  # threads of them are busy in the kernel
            else:
                self._wait(changes, [watched for _, watched in waited])
            for ticket, watched in waited:
                if watched.word.value != watched.alive:
                    with self._lock:
                        del self._watched[ticket]
                    if self._changed(watched):
                        ending.append(watched)
            # In turn: one that takes its time must not keep the others waiting.
            ending = [watched for watched in ending if self._still_ends(watched)]
        with self._lock:
            dropped, self._watched = list(self._watched.values()), {}
        for watched in dropped:
            libc.munmap(watched.page, PAGE_BYTES)

    def _wait(self, changes: int, watched: list[_Watched]) -> None:
        """Block until a word, or the set of them, is no longer what it was."""
        waits = (_Wait * (1 + len(watched)))()
        waits[0] = _Wait(changes, ctypes.addressof(self._changes), _SIZE_U32 | _PRIVATE, 0)
        for at, each in enumerate(watched, 1):
            waits[at] = _Wait(each.alive, ctypes.addressof(each.word), _SIZE_U32, 0)
        woken = libc.syscall(
            ctypes.c_long(_SYS_FUTEX_WAITV), ctypes.byref(waits), ctypes.c_uint(len(waits)),
            ctypes.c_uint(0), None, ctypes.c_int(0),
        )  # fmt: skip
        if woken < 0 and (code := ctypes.get_errno()) not in (errno.EAGAIN, errno.EINTR):
            logger.debug("this kernel cannot wait for lifelines: %s", os.strerror(code))
            self._unable = True

    def _changed(self, watched: _Watched) -> bool:
        """Whoever held the mutex let go of it. Returns whether the kernel did that for it."""
        died = watched.word.value & OWNER_DIED
        # The kernel wakes one of those who wait for a mutex; the others are ours to wake.
        lifeline.futex(ctypes.addressof(watched.word), _WAKE, _EVERYBODY)
        libc.munmap(watched.page, PAGE_BYTES)
        return bool(died)

    def _still_ends(self, watched: _Watched) -> bool:
        """Look once: tell if that is the end of the process. Returns whether to look again."""
        if watched.forgotten:
            return False
        if exiting(watched.pid):
            try:
                watched.on_exit(exit_code(watched.pid))
            except Exception:
                logger.exception("who was told of the end of process %s raised", watched.pid)
            return False
        watched.looks += 1
        if watched.looks < _LOOKS:
            return True
        logger.debug(
            "process %s let go of its lifeline and still runs after %d looks: its end is told by "
            "others",
            watched.pid,
            watched.looks,
        )
        return False


def exiting(pid: int) -> bool:
    """Whether no thread of the process runs its program any more; True when it is gone."""
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
    except OSError:
        return True
    return all(_thread_exits(thread) for thread in threads)


def exit_code(pid: int) -> int | None:
    """The exit code of a process that exits, or minus its signal; None when it cannot be known."""
    try:
        status = int(stat_fields(Path(f"/proc/{pid}"))[-1])
        return os.waitstatus_to_exitcode(status)
    except (OSError, ValueError):
        return None


def _thread_exits(thread: Path) -> bool:
    try:
        fields = stat_fields(thread)
    except OSError:
        return True  # it is gone
    return fields[0] in (b"Z", b"X") or bool(int(fields[6]) & _PF_EXITING)


def _told(told: object) -> Told | None:
    """What a stranger says of its lifeline; None when it makes no sense."""
    if isinstance(told, Mapping):
        told = [told.get(name) for name in Told._fields]
    if not isinstance(told, list | tuple) or len(told) != len(Told._fields):
        return None
    pid, fd, serial, nonce = told
    if not isinstance(nonce, str) or any(type(n) is not int or n < 0 for n in (pid, fd, serial)):
        return None
    return Told(pid, fd, serial, nonce)


def _map(process: Told) -> int | None:
    """The address of the page, mapped to be read; None when it is not the one."""
    try:
        fd = os.open(f"/proc/{process.pid}/fd/{process.fd}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        found = os.fstat(fd)
        if (found.st_ino, found.st_size) != (process.serial, PAGE_BYTES):
            return None
        if os.pread(fd, lifeline.NONCE_BYTES, 0).hex() != process.nonce:
            return None
        return lifeline.map_page(fd)
    except OSError:
        return None
    finally:
        os.close(fd)
