"""Environments: a virtual environment for each peer, kept in a cache folder; all share one torch.

The torch that ftkit runs on is lent to every environment by a `.pth` file, and pip is held to its
version: all tools then compute with the same torch, and an environment costs what the peer itself
takes. What a peer wants in another version is installed into its environment and comes first there.
"""

import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks.peers import NoPeer

#: For pip, which may have to download; and for a first import.
INSTALL_S, PROBE_S = 1800.0, 300.0

#: An error with words of its own, and how much of them is shown.
_TOLD = re.compile(r"(^|\s|\.)\w*(Error|ERROR): +\S")
WORDS = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """What a peer needs, and how to see that it is there."""

    name: str
    packages: tuple[str, ...]
    probe: str
    """Python that fails when the peer cannot be used."""


def lent() -> Path:
    """The folder that this interpreter's torch is imported from."""
    return Path(torch.__file__).parents[1]


def release(of: str) -> str:
    """A version without its local part: `2.13.0` of `2.13.0+cpu`; pure."""
    return of.partition("+")[0]


def interpreter(wanted: Environment, cache: Path, say: Callable[[str], None]) -> Path:
    """The Python of a peer's environment under `cache`, made if need be. Blocks.

    Raises:
      NoPeer: it could not be made, or the peer cannot be imported; says what pip or Python said.
    """
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    ours = release(version("torch"))
    folder = cache / f"env-{wanted.name}-python{python}-torch{ours}"
    found, stamp = folder / "bin" / "python", folder / "ftkit-installed"
    recipe = "\n".join([*wanted.packages, f"torch=={ours}", str(lent())])
    if not (found.exists() and stamp.is_file() and stamp.read_text() == recipe):
        _make(wanted, folder, ours, python, say)
        stamp.write_text(recipe)
    done = _python(found, "-c", wanted.probe, name=wanted.name, limit_s=PROBE_S)
    if done.returncode:
        raise NoPeer(f"{wanted.name} cannot be imported: {last_words(done.stderr)}")
    return found


def _make(
    wanted: Environment, folder: Path, ours: str, python: str, say: Callable[[str], None]
) -> None:
    say(f"{wanted.name}: installing {' '.join(wanted.packages)} into {folder} (once)")
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        venv.create(folder, with_pip=True)
        site = folder / "lib" / f"python{python}" / "site-packages"
        (site / "ftkit-torch.pth").write_text(f"{lent()}\n")
        held = folder / "constraints.txt"
        held.write_text(f"torch=={ours}\n")
    except (OSError, subprocess.SubprocessError) as error:
        raise NoPeer(f"{wanted.name}'s environment {folder} could not be made: {error}") from error
    pip = ("-m", "pip", "install", "--quiet", "--constraint", str(held), *wanted.packages)
    done = _python(folder / "bin" / "python", *pip, name=wanted.name, limit_s=INSTALL_S)
    if done.returncode:
        raise NoPeer(
            f"{wanted.name} could not be installed: pip exited with {done.returncode}: "
            f"{last_words(done.stderr)}"
        )


def _python(
    python: Path, *arguments: str, name: str, limit_s: float
) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            [str(python), *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=limit_s,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise NoPeer(f"{name}'s environment {python.parents[1]} cannot be used: {error}") from error


def last_words(errors: str) -> str:
    """What a process died of, in a line: the last one that names an error and says of what; pure.

    An assertion without words is told with its source line.
    """
    lines = [line.strip() for line in errors.splitlines() if line.strip(" ^~")]
    for number in range(len(lines) - 1, -1, -1):
        line = lines[number]
        if _TOLD.search(line):
            return line[:WORDS]
        if line.endswith("Error") and line.isidentifier():
            return f"{line} at: {lines[max(number - 1, 0)]}"[:WORDS]
    return (lines or ["it said nothing"])[-1][:WORDS]
