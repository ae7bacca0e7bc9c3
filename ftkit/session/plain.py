"""Plain: what a script that knows nothing of ftkit is watched by, under `ftkit run`.

The process that ranks are forked from calls `prepare` before it runs the script. Nothing happens
then, until the script makes a gloo group without a session: from there on its collectives are
recorded on the node's status board, each optimizer step counts as a step, and its stacks can be
asked for. `ftkit.init()` takes over where a script calls it. FTKIT_RECORD=0 leaves all of it out.
"""

import contextlib
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from torch.optim.optimizer import register_optimizer_step_post_hook

from ftkit.collectives import recorded
from ftkit.core.clock import MonotonicClock
from ftkit.core.errors import FtkitError
from ftkit.core.ids import MemberId, Step
from ftkit.core.rank_env import RankEnv
from ftkit.detection import obituary, stacks
from ftkit.detection.config import DetectionConfig
from ftkit.detection.recorder import Recorder
from ftkit.detection.row import PLAIN, Phase
from ftkit.detection.status import BOARD, StatusBoard

logger = logging.getLogger(__name__)

#: "0" in the environment of a rank: record nothing.
VARIABLE = "FTKIT_RECORD"


def prepare(environ: Mapping[str, str]) -> None:
    """Have this process's gloo groups recorded, once it makes any. Never raises.

    Args:
      environ: of the rank. Without a job in it, or with FTKIT_RECORD=0, nothing is done.
    """
    try:
        env = RankEnv.read(environ)
    except FtkitError:
        return  # `ftkit.init` will say what is wrong
    if env is None or environ.get(VARIABLE) == "0":
        return
    global _watched
    _watched = watched = _Watched(env)
    if not recorded.install(watched.recorder):
        logger.info("this version of torch does not let gloo groups be recorded")


def give_way() -> None:
    """A session takes the seat's row over."""
    if _watched is not None:
        _watched.close()


class _Watched:
    """The one process, from its first group on."""

    def __init__(self, env: RankEnv) -> None:
        self._env = env
        self._recorder: Recorder | None = None
        self._failed = False
        self._last = contextlib.ExitStack()
        self._steps = 0

    def recorder(self) -> Recorder | None:
        """The recorder of this process; None where a session has one, or it cannot be had."""
        if _has_session():
            return None
        if self._recorder is None and not self._failed:
            try:
                self._recorder = self._begin()
            except (FtkitError, OSError, ValueError) as error:
                # The script's own work must not fail for it.
                self._failed = True
                logger.warning("this script's collectives are not recorded: %s", error)
        return self._recorder

    def close(self) -> None:
        """Record nothing more. What was begun before goes on unrecorded."""
        self._failed = True
        recorder, self._recorder = self._recorder, None
        if recorder is not None:
            recorder.close()
        self._last.close()

    def _begin(self) -> Recorder:
        env = self._env
        member, folder = MemberId(env.member), Path(env.shm_dir)
        board = StatusBoard.open(folder / BOARD)
        writer = board.attach(env.local_seat, member)
        writer.flags |= PLAIN
        interval_s = DetectionConfig(max_stall_s=env.max_stall_s).heartbeat_interval_s
        recorder = Recorder(writer, MonotonicClock(), heartbeat_interval_s=interval_s)
        recorder.phase(Phase.FORWARD)
        recorder.step(Step(0))
        self._last.enter_context(stacks.answering(folder, member))
        register_optimizer_step_post_hook(self._stepped)
        before = sys.excepthook

        def leave_word(
            kind: type[BaseException], error: BaseException, trace: TracebackType | None
        ) -> None:
            obituary.leave(folder, member, error)
            before(kind, error, trace)

        sys.excepthook = leave_word
        return recorder

    def _stepped(self, *args: Any) -> None:
        """(optimizer post-hook) One more step."""
        if self._recorder is not None:
            self._steps += 1
            self._recorder.step(Step(self._steps))


#: Set by `prepare`, once a process.
_watched: _Watched | None = None


def _has_session() -> bool:
    """Whether `ftkit.init` was called."""
    start = sys.modules.get("ftkit.session.start")
    return getattr(start, "_session", None) is not None
