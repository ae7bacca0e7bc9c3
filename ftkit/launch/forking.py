"""ForkServer: an agent's end of the process that its ranks are forked from (`fork_server`)."""

import ctypes
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum, auto
from functools import partial
from typing import IO

from ftkit.launch import fork_server
from ftkit.launch.fork_server import PID_BYTES, Program, receive, send
from ftkit.launch.ranks import Child, die_with, execute

logger = logging.getLogger(__name__)

_PR_SET_CHILD_SUBREAPER = 36

#: A fork takes some ten milliseconds. Whoever needs longer than this will not answer.
ANSWER_S = 5.0


class State(StrEnum):
    """What the fork server can be asked for."""

    STARTING = auto()
    """It imports. Wait, or start ranks the slow way."""
    READY = auto()
    """It forks at once."""
    GONE = auto()
    """It ended or may not be forked; ranks are started the slow way from here on."""


@dataclass(frozen=True, slots=True)
class _Forked:
    """A child of this process that `subprocess` knows nothing of. See `Child`."""

    pid: int

    def wait(self) -> int:
        _, status = os.waitpid(self.pid, 0)
        return os.waitstatus_to_exitcode(status)


class ForkServer:
    """Owns the process. `start` is called by the agent's main thread."""

    def __init__(
        self,
        env: Mapping[str, str],
        *,
        cwd: str | None = None,
        frameworks: Sequence[str] = (),
        changed: Callable[[], None],
    ) -> None:
        """Start the process; it imports while the caller goes on.

        From here on this process is a subreaper: whatever its descendants leave behind becomes
        its child.

        Args:
          env: the whole environment that modules are imported in.
          cwd: the directory that ranks will start in, which some modules remember; None for
            this process's own.
          frameworks: modules to import besides torch (`Program.frameworks`).
          changed: called, on a thread of its own, when `state` is no longer STARTING.

        Raises:
          OSError: no process can be started.
        """
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._state = State.STARTING
        self._changed = changed
        self._channel, theirs = socket.socketpair()
        # Run as a file, so that no module of the user's directory is imported for one of Python's.
        with theirs:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-u", fork_server.__file__),
                    *(str(theirs.fileno()), str(os.getpid())),
                    *frameworks,
                ],
                env=dict(env),
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                preexec_fn=partial(die_with, os.getpid()),  # noqa: PLW1509  # system calls, no lock
                start_new_session=True,
            )
        self._ready = threading.Thread(
            target=self._wait_ready, name="ftkit-fork-server", daemon=True
        )
        self._ready.start()

    @property
    def state(self) -> State:
        return self._state

    @property
    def pid(self) -> int:
        return self._process.pid

    def start(
        self,
        command: tuple[str, ...],
        env: Mapping[str, str],
        cwd: str | None,
        output: IO[bytes] | None,
    ) -> Child:
        """Start a process that runs `command`, forked where that can be done. A `Starter`. Blocks.

        Raises:
          OSError: it can be started neither way.
        """
        program = Program.of(command)
        if self._state is not State.READY or program is None:
            return execute(command, env, cwd, output)
        order = {"program": asdict(program), "env": dict(env), "cwd": cwd or os.getcwd()}
        leash, theirs = socket.socketpair()
        with leash:
            leash.settimeout(ANSWER_S)
            try:
                with theirs:
                    fds = [theirs.fileno(), *([output.fileno()] if output is not None else [])]
                    send(self._channel, order, fds)
                pid = int.from_bytes(leash.recv(PID_BYTES), "big")
                leash.sendall(b"!")
            except OSError as error:
                pid = 0
                logger.warning("the fork server failed: %s", error)
        if not pid:
            # A rank that it may have forked finds its leash cut, and ends.
            self._end()
            return execute(command, env, cwd, output)
        return _Forked(pid)

    def close(self) -> None:
        """End the process. The ranks it forked go on. Safe to call twice."""
        self._end()

    def _wait_ready(self) -> None:
        """(own thread) Learn whether it may be forked."""
        try:
            answer = receive(self._channel)
        except OSError as error:
            answer = None
            logger.debug("the fork server hung up: %s", error)
        if self._state is State.STARTING:
            reason = "it ended" if answer is None else answer[0]["unfit"]
            if reason:
                logger.info("ranks are started without the fork server: %s", reason)
            self._channel.settimeout(ANSWER_S)
            self._state = State.GONE if reason else State.READY
        self._changed()

    def _end(self) -> None:
        self._state = State.GONE
        self._process.kill()  # which ends the thread that waits for it, too
        self._process.wait()
        self._ready.join()
        self._channel.close()
