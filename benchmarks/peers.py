"""Peers that run inside a benchmark's own process, installed into a folder beside its packages."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.figures import say

TORCH_CHECKPOINTING = "torch_checkpointing==0.1.1"


class NoPeer(RuntimeError):
    """A peer cannot be installed or imported here; the message says exactly why."""


def peers_folder() -> Path:
    """Where peers are installed unless another folder is named."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return cache / "ftkit" / "peers"


def need(requirement: str, folder: Path) -> None:
    """Make a package importable here, installed into `folder` if need be. Blocks.

    Without its dependencies: it is to run on the torch that ftkit runs on, in one process, or
    the two could not take turns.

    Raises:
      NoPeer: it could not be made; says what pip or Python said.
    """
    name = requirement.partition("==")[0]
    target = folder / requirement.replace("==", "-")
    if not target.is_dir():
        say(f"installing {requirement} into {target} (once)")
        part = target.with_name(target.name + ".part")
        done = subprocess.run(
            [
                *(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"),
                *("--target", str(part), requirement),
            ],
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )
        if done.returncode:
            raise NoPeer(f"{requirement} could not be installed: {done.stderr.strip()[-500:]}")
        part.rename(target)
    sys.path.append(str(target))
    try:
        importlib.import_module(name)
    except ImportError as error:
        sys.path.remove(str(target))
        raise NoPeer(f"{requirement} could not be imported: {error}") from error
