"""SelfChecker: an agent's runner of `self_check`, in a process of its own at idle priority.

One at a time, on a thread that waits for it; whatever goes wrong is a result with an error.
"""

import json
import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence

from ftkit.core.clock import Clock
from ftkit.core.ids import NodeId
from ftkit.detection.signals import NodeChecked

logger = logging.getLogger(__name__)

#: It takes about a second of two cores; beside training, at idle priority, some more.
LIMIT_S = 60.0
COMMAND = (sys.executable, "-m", "ftkit.launch.self_check")


class SelfChecker:
    """Of one node. `start` returns at once; `close` ends what runs."""

    def __init__(
        self,
        node: NodeId,
        clock: Clock,
        done: Callable[[NodeChecked], None],
        *,
        command: Sequence[str] = COMMAND,
        limit_s: float = LIMIT_S,
    ) -> None:
        """Report results of `node` to `done`, on a thread of its own."""
        self._node, self._clock, self._done = node, clock, done
        self._command, self._limit_s = list(command), limit_s
        self._lock = threading.Lock()
        # ---- under the lock ----
        self._process: subprocess.Popen[str] | None = None
        self._busy = False
        self._closed = False

    def start(self) -> None:
        """Check this node, unless it is being checked."""
        with self._lock:
            if self._busy or self._closed:
                return
            self._busy = True
        threading.Thread(target=self._run, name="ftkit-self-check", daemon=True).start()

    def close(self) -> None:
        """End a check that runs. Safe to call twice."""
        with self._lock:
            self._closed = True
            if self._process is not None:
                self._process.kill()

    def _run(self) -> None:
        """(checking thread) Run it, and tell what came of it."""
        try:
            result, error = self._check(), ""
        except (OSError, TypeError, ValueError, subprocess.TimeoutExpired) as problem:
            logger.debug("the self-check failed: %s", problem)
            result, error = {}, str(problem) or type(problem).__name__
        with self._lock:
            self._busy, self._process = False, None
            closed = self._closed
        if not closed:
            self._done(
                NodeChecked(node=self._node, at=self._clock.now(), result=result, error=error)
            )

    def _check(self) -> dict[str, object]:
        with self._lock:
            if self._closed:
                raise OSError("the agent ends")
            process = self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        try:
            out, _ = process.communicate(timeout=self._limit_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise
        return dict(json.loads(out))
