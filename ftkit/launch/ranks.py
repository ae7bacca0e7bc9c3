"""RankProcess: one training process, from spawn to exit, as its agent sees it."""

import ctypes
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import IO, Protocol

from ftkit.core import exit_codes
from ftkit.core.ids import MemberId, Seat

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)

#: Of a rank's log, how much is quoted when it fails.
TAIL_BYTES = 4096


def die_with(parent: int) -> None:
    """Have the kernel kill this process when the thread that started it ends.

    Meant to run in the child between fork and exec; system calls only.

    Args:
      parent: the process that started this one. If it is gone already, no signal will come,
        so this process ends at once.
    """
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(exit_codes.AGENT_GONE)


class Child(Protocol):
    """A process that this one has to wait for."""

    @property
    def pid(self) -> int: ...

    def wait(self) -> int:
        """The exit code, or minus the signal. Blocks until it has ended."""
        ...


class Starter(Protocol):
    """Starts the program of a rank, with its output to a file or passed through."""

    def __call__(
        self,
        command: tuple[str, ...],
        env: Mapping[str, str],
        cwd: str | None,
        output: IO[bytes] | None,
    ) -> Child:
        """Raises OSError when it cannot be started."""
        ...


def execute(
    command: tuple[str, ...], env: Mapping[str, str], cwd: str | None, output: IO[bytes] | None
) -> Child:
    """Start any program, in a session of its own. A `Starter`."""
    return subprocess.Popen(
        command,
        env=dict(env),
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT if output else None,
        preexec_fn=partial(die_with, os.getpid()),  # noqa: PLW1509  # system calls, no lock
        start_new_session=True,
    )


class RankProcess:
    """One incarnation of a seat. The agent's main thread owns it."""

    def __init__(
        self,
        member: MemberId,
        seat: Seat,
        command: tuple[str, ...],
        env: Mapping[str, str],
        *,
        cwd: str | None = None,
        log: Path | None,
        on_exit: Callable[[MemberId], None],
        start: Starter = execute,
    ) -> None:
        """Start the process, in a process group of its own.

        Args:
          member: the incarnation.
          seat: the seat it fills.
          command: program and arguments.
          env: its whole environment.
          cwd: the directory to start in; None for this process's own.
          log: file for its output, appended to; None passes the output through.
          on_exit: called on a thread of its own as soon as the process is gone.
          start: how.

        Raises:
          OSError: the program cannot be started.
        """
        self.member = member
        self.seat = seat
        self._log = log
        self._log_start = 0
        output = None
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
            output = log.open("ab")
            self._log_start = output.tell()
        try:
            self._process = start(command, env, cwd, output)
        finally:
            if output is not None:
                output.close()
        self._exit_code: int | None = None
        self._gone = False
        threading.Thread(
            target=self._wait, args=(on_exit,), name=f"ftkit-wait-{member}", daemon=True
        ).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """The exit code, or minus the signal; None while it runs."""
        return self._exit_code

    @property
    def gone(self) -> bool:
        """Whether it has given back its memory and its devices, too."""
        return self._gone

    def begins_to_exit(self, code: int) -> None:
        """It runs no more and will be gone with `code`. What it started is killed."""
        if self._exit_code is None:
            self._exit_code = code
            self.sweep()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process and all it started, if it still runs."""
        if self._exit_code is None:
            try:
                os.killpg(self._process.pid, number)
            except ProcessLookupError:
                pass  # it ended this instant

    def sweep(self) -> None:
        """Kill what the process left behind in its group (data loader workers)."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass  # nothing was left

    def last_words(self) -> str:
        """The end of what it wrote, when its output goes to a file."""
        if self._log is None:
            return ""
        with self._log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(self._log_start, size - TAIL_BYTES))
            return file.read().decode(errors="replace").strip()

    def _wait(self, on_exit: Callable[[MemberId], None]) -> None:
        code = self._process.wait()
        self.sweep()
        if self._exit_code is None:
            self._exit_code = code
        self._gone = True
        on_exit(self.member)
        self._reap()

    def _reap(self) -> None:
        """Wait for what it left behind: it is ours where this process is a subreaper."""
        while True:
            try:
                os.waitpid(-self._process.pid, 0)
            except ChildProcessError:
                return
