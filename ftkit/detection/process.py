"""What Linux says about processes: that one exits, at once, and how one fares, from /proc."""

import os
import select
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from ftkit.detection.observations import ProcessFacts

_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True, kw_only=True)
class Exit:
    """How a process ended. Code and signal are both None when someone else reaped it."""

    pid: int
    code: int | None
    signal: int | None


class ExitWatcher:
    """Tells of the end of child processes within microseconds, and reaps none of them.

    Each child is held by a pidfd, so a pid that is used again is never mistaken. The status is
    read with WNOWAIT: the owner's `waitpid` (or `Popen.wait`) works as without us; if the owner
    was first, the exit is still told, without its code. One thread waits; `watch` may be called
    from others. Linux 5.3 or later.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._pids: dict[int, int] = {}

    def watch(self, pid: int) -> None:
        """Begin to watch a child that was not reaped yet. Raises ProcessLookupError otherwise."""
        fd = os.pidfd_open(pid)
        self._pids[fd] = pid
        self._epoll.register(fd, select.EPOLLIN)

    def wait(self, timeout_s: float | None) -> list[Exit]:
        """Block until a watched process ends or `timeout_s` pass; None waits for ever.

        Returns:
          Every watched process that has ended since, each told once; [] at the timeout.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            exits = [self._collect(fd) for fd, _ in self._epoll.poll(left) if fd in self._pids]
            if exits or (left is not None and left <= 0.0):
                return exits

    def fileno(self) -> int:
        """A descriptor that is readable when `wait(0)` has something to tell."""
        return self._epoll.fileno()

    def close(self) -> None:
        """Stop watching. May be called twice."""
        while self._pids:
            fd, _ = self._pids.popitem()
            os.close(fd)
        self._epoll.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _collect(self, fd: int) -> Exit:
        pid = self._pids.pop(fd)
        try:
            found = os.waitid(os.P_PIDFD, fd, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        except ChildProcessError:
            found = None  # reaped by its owner, or never our child
        finally:
            self._epoll.unregister(fd)
            os.close(fd)
        if found is None:
            return Exit(pid=pid, code=None, signal=None)
        if found.si_code == os.CLD_EXITED:
            return Exit(pid=pid, code=found.si_status, signal=None)
        return Exit(pid=pid, code=None, signal=found.si_status)


def process_facts(pid: int) -> ProcessFacts | None:
    """What the kernel says of `pid` now; None when there is no such process. About 30 µs."""
    directory = Path("/proc") / str(pid)
    try:
        stat = (directory / "stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command name stands in parentheses and may hold anything, these included.
    fields = stat.rpartition(b")")[2].split()
    return ProcessFacts(
        state=fields[0].decode(),
        cpu_ticks=int(fields[11]) + int(fields[12]),
        rss_bytes=int(fields[21]) * _PAGE_BYTES,
        wchan=_first_word(directory / "wchan"),
        syscall=_first_word(directory / "syscall"),
        start_ticks=int(fields[19]),
        ticks_per_s=_TICKS_PER_S,
    )


def _first_word(path: Path) -> str:
    try:
        words = path.read_text().split()
    except OSError:
        return ""  # gone, or not ours to see; either way it is a detail
    return words[0] if words and words[0] not in ("0", "running") else ""
