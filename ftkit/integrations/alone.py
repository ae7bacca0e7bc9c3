"""Alone: to a framework each rank is a process of its own; what is shared is ftkit's business.

A framework that reads the launcher's variables would make a process group, wrap the model and
deal out the data by rank: all of it fixed for the life of the process, where a world changes.
"""

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version

import torch
from packaging.requirements import Requirement

from ftkit.session import Session

#: What frameworks look at to find that they are one of several.
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK")

#: Where Accelerate looks for the device of one that is alone; it would take the first.
_DEVICE = "ACCELERATE_TORCH_DEVICE"


def local_rank() -> int:
    """This process's place on its node, as the launcher says it."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def own_gpu() -> torch.device | None:
    """The GPU of this rank; ranks share one where there are fewer. None where there is none."""
    if not torch.cuda.is_available():
        return None
    return torch.device("cuda", local_rank() % torch.cuda.device_count())


@contextlib.contextmanager
def alone(*, cpu: bool = False) -> Iterator[None]:
    """Hide the launcher's variables from what reads them meanwhile. One thread.

    `cpu`: the GPU is not asked for.
    """
    gpu = None if cpu else own_gpu()
    hidden = {name: os.environ.pop(name) for name in LAUNCHER if name in os.environ}
    device = os.environ.get(_DEVICE)
    if gpu is not None and device is None:
        os.environ[_DEVICE] = str(gpu)
    try:
        yield
    finally:
        os.environ.update(hidden)
        if device is None:
            os.environ.pop(_DEVICE, None)


def local_index(session: Session) -> int:
    """This rank's place among the members of the present world on its node; 0 leads there."""
    nodes = [member.node for member in session.world.members]
    mine = nodes[session.rank]
    return nodes[: session.rank].count(mine)


def require(extra: str, *modules: str, name: str = "") -> None:
    """Raise ImportError, which says what to install, where a framework is missing, or is another one.

    Args:
      extra: what installs them.
      *modules: what has to be there.
      name: of the integration, where it is not called as the extra is.
    """
    missing = [m for m in modules if importlib.util.find_spec(m) is None]
    if what := " and ".join(missing) or _unfit(extra):
        raise ImportError(
            f"ftkit.integrations.{name or extra} needs {what}: pip install 'ftkit[{extra}]'"
        )


def _unfit(extra: str) -> str:
    """What an extra asks for, and what is there in another version; empty where all fit."""
    try:
        wanted = [Requirement(text) for text in requires("ftkit") or ()]
    except PackageNotFoundError:  # read from its source
        return ""
    for one in wanted:
        if one.marker is None or not one.marker.evaluate({"extra": extra}):
            continue
        try:
            found = version(one.name)
        except PackageNotFoundError:
            continue
        if not one.specifier.contains(found, prereleases=True):
            return f"{one.name}{one.specifier}, and {found} is installed"
    return ""
