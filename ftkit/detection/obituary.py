"""Obituary: what a process that ends by an exception leaves behind in shared memory.

Its agent learns the exit code from the kernel, and nothing more: the traceback went wherever the
rank's output goes. One small file says which exception it was.
"""

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path

from ftkit.core.ids import MemberId

#: Of the exception's text, as much as says what happened.
TEXT_MAX = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Obituary:
    """The exception that ended a process."""

    error: str
    """Its type."""
    text: str

    def __str__(self) -> str:
        return f"{self.error}: {self.text}" if self.text else self.error


def path(folder: Path, member: MemberId) -> Path:
    """Where the obituary of `member` lies in its node's folder of shared memory."""
    return folder / f"obituary-{member}.json"


def leave(folder: Path, member: MemberId, error: BaseException) -> None:
    """Write it, whole or not at all. For the process that ends: never raises."""
    # Without memory, or without a folder, the exit code has to do; a user's error may even fail
    # to say what it is.
    with contextlib.suppress(Exception):
        told = {"error": type(error).__name__, "text": str(error)[:TEXT_MAX]}
        part = path(folder, member).with_suffix(".part")
        part.write_text(json.dumps(told))
        part.replace(path(folder, member))


def read(folder: Path, member: MemberId) -> Obituary | None:
    """What `member` left; None when it left nothing that can be read."""
    try:
        told = json.loads(path(folder, member).read_text())
        return Obituary(error=str(told["error"])[:200], text=str(told["text"])[:TEXT_MAX])
    except (OSError, ValueError, KeyError, TypeError):
        return None
