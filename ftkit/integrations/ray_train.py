"""Ray Train: each of its workers is a node of ftkit, whose agent keeps several ranks.

`FtkitConfig` is a backend config and `in_ranks` makes a training function run in the ranks. A rank
that dies is repaired by ftkit alone, and Ray Train notices nothing. A worker that dies is replaced
by Ray Train while the others train on; the new one's ranks are let in and catch up.

This module is imported in ranks, too, for `report`: it imports Ray only for `FtkitConfig`.
"""

import functools
import inspect
import json
import os
import runpy
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftkit.core.errors import UsageError
from ftkit.launch.ray_train_rank import REPORT_BYTES_MAX, REPORTS

if TYPE_CHECKING:
    from ftkit.launch.ray_train_backend import FtkitConfig

__all__ = ["FtkitConfig", "in_ranks", "report"]


def __getattr__(name: str) -> Any:
    if name != "FtkitConfig":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ftkit.integrations.alone import require

    require("raytrain", "pandas", "pydantic", "requests", "cloudpickle", name="ray_train")
    from ftkit.launch.ray_train_backend import FtkitConfig

    return FtkitConfig


def in_ranks(train: Callable[..., object] | str, *arguments: str) -> Callable[..., None]:
    """A `train_loop_per_worker` that runs in each rank of a worker, and ends with the job.

    Args:
      train: called in each rank as Ray Train would call it in the worker, with the
        `train_loop_config` where there is one; or the path of a script.
      *arguments: of the script.

    Returns:
      What `TorchTrainer(..., torch_config=FtkitConfig())` takes. It raises `JobFailed` in every
      worker when the job failed.

    Raises:
      UsageError: there is no such script, or arguments were given to a function.
    """
    if isinstance(train, str):
        script = Path(train).resolve()
        if not script.is_file():
            raise UsageError(f"there is no script {script}; in_ranks takes its path, or a function")
        train = functools.partial(_run_script, str(script), arguments)
    elif arguments:
        raise UsageError("in_ranks(function) takes no arguments: give them in train_loop_config")

    def with_config(config: Mapping[str, Any]) -> None:
        from ftkit.launch.ray_train_worker import train_in_ranks

        train_in_ranks(functools.partial(train, config))

    def without_config() -> None:
        from ftkit.launch.ray_train_worker import train_in_ranks

        train_in_ranks(train)

    # Ray Train, too, gives the config to functions that ask for something.
    return with_config if _takes_config(train) else without_config


def report(metrics: Mapping[str, Any]) -> None:
    """Have this rank's worker tell Ray Train of `metrics`. Never blocks, never stops training.

    Call it on every rank: the first of a worker's ranks speaks for it, and Ray Train takes what
    worker 0 says. It takes one report every two seconds or so; of what comes faster the newest is
    passed on, and the rest is not. Outside a job, or where the worker cannot listen, nothing happens.

    Args:
      metrics: what `ray.train.report` is to be given; JSON.

    Raises:
      UsageError: they are no JSON, or more than `REPORT_BYTES_MAX` bytes of it.
    """
    try:
        data = json.dumps(dict(metrics)).encode()
    except (TypeError, ValueError) as error:
        raise UsageError(f"metrics are numbers and text, as JSON has them: {error}") from error
    if len(data) > REPORT_BYTES_MAX:
        raise UsageError(f"metrics of {len(data)} bytes; at most {REPORT_BYTES_MAX} are passed on")
    folder = os.environ.get("FTKIT_SHM_DIR")
    if folder is None or not _speaks():
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        try:
            sock.sendto(data, str(Path(folder) / REPORTS))
        except OSError:
            pass  # the worker is busy or gone; a report is not worth a step


def _speaks() -> bool:
    """Whether this rank is the first of its node's in the present world."""
    from ftkit.integrations.alone import local_index
    from ftkit.session import init

    return local_index(init()) == 0


def _takes_config(train: Callable[..., object]) -> bool:
    """Whether the function cannot be called without an argument."""
    free = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(train).parameters.values()
    return any(p.default is p.empty and p.kind in free for p in parameters)


def _run_script(script: str, arguments: tuple[str, ...]) -> None:
    """Be that script, as Python would run it."""
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")
