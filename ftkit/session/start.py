"""init: how a process becomes a rank."""

import atexit
import os
import sys
import threading
import traceback
from functools import partial
from pathlib import Path
from types import TracebackType

import torch.distributed as dist

from ftkit.collectives import backend
from ftkit.core import exit_codes
from ftkit.core.errors import CapacityError, JobStopped, UsageError
from ftkit.core.ids import MemberId
from ftkit.core.rank_env import RankEnv
from ftkit.detection import obituary
from ftkit.session.parts import assemble
from ftkit.session.session import Session

_session: Session | None = None
_lock = threading.Lock()


def init() -> Session:
    """Join the job this process was started for, or be alone. Blocks until the world stands.

    Afterwards `torch.distributed` is initialized with the backend "ftkit" over the same
    world, so DDP and plain collectives work. A process that replaces a dead one gets a world
    of one until the step loop lets it in. Called again, it returns the same session.

    Raises:
      UsageError: started by another launcher, or with an incomplete environment.
      JobStopped: the job ended before this rank could join.
    """
    global _session
    with _lock:
        if _session is None:
            _session = _start()
        return _session


def _start() -> Session:
    env = RankEnv.read(os.environ)
    if env is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(
            "this process is one of several, but ftkit did not start it: use "
            "`ftkit run --nproc N script.py` in place of torchrun"
        )
    parts = assemble(env, os.environ)
    session = Session(parts)
    sys.excepthook = partial(_say_whose_fault, env)
    session.join()
    backend.register()
    backend.bind(parts.group)
    dist.init_process_group(
        "ftkit",
        store=dist.HashStore(),  # type: ignore[attr-defined]  # public, but not listed
        rank=session.rank,
        world_size=session.world_size,
    )
    atexit.register(session.close)
    return session


def _say_whose_fault(
    env: RankEnv | None,
    kind: type[BaseException],
    error: BaseException,
    trace: TracebackType | None,
) -> None:
    """(sys.excepthook) Tell the agent by the exit code what a retry could not mend."""
    # torch.distributed puts a hook around ours that collects what goes to `sys.stderr`, to
    # print it afterwards: there is no afterwards here.
    stderr = sys.__stderr__
    if env is not None:
        obituary.leave(Path(env.shm_dir), MemberId(env.member), error)
    if isinstance(error, JobStopped):
        print(f"ftkit: this rank leaves: {error}", file=stderr)
        code = exit_codes.STOPPED
    else:
        traceback.print_exception(kind, error, trace, file=stderr)
        code = exit_codes.USAGE if isinstance(error, (UsageError, CapacityError)) else 1
    for stream in (sys.stdout, stderr):
        if stream is not None:
            stream.flush()
    # Without the goodbye of an orderly end: peers must not take this for one.
    os._exit(code)
