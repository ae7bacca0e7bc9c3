"""The event stream: one JSON object a line, one file a process, written at once.

Every line has `t` (Unix seconds), `mono` (monotonic seconds, comparable on one host) and
`kind`; the rest is the writer's context (seat, member, generation, step) and the event's
own fields. A line is one `write` to a file opened with O_APPEND, so it is whole even when
the process is killed on the next instruction, and a reader may follow it live.
"""

import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ftkit.core.errors import UsageError


class Trace:
    """An append-only event stream. Thread-safe: a line is one system call."""

    def __init__(self, path: Path, **context: object) -> None:
        """Open `path` for appending; `context` is added to every line."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._context = dict(context)
        self.kinds: set[str] = set()
        """The kinds of events written so far."""

    def event(self, kind: str, /, **fields: object) -> None:
        """Write one event. Values must be JSON-safe; never raises for a full disk."""
        self.kinds.add(kind)
        line = {
            "t": round(time.time(), 6),
            "mono": round(time.monotonic(), 6),
            "kind": kind,
        }
        data = json.dumps(line | self._context | fields, separators=(",", ":")) + "\n"
        try:
            os.write(self._fd, data.encode())
        except OSError:
            # A lost line of telemetry must not cost a training step.
            return

    def close(self) -> None:
        """Close the file. Further events are dropped."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


#: What comes of reading an event that ftkit did not write so: a field is not there, is something else,
#: or is a number beyond all use.
MALFORMED = (KeyError, TypeError, ValueError, OverflowError)


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """The events of one file, in order. A torn last line is left out, and so is what is none."""
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                return
            if (event := parse_event(line)) is not None:
                yield event


def read_run(run_dir: Path) -> list[dict[str, Any]]:
    """All events of a run, from every process, in order of time."""
    events = [e for path in sorted(run_dir.glob("events/*.jsonl")) for e in read_events(path)]
    return sorted(events, key=lambda e: float(e["mono"]))


@contextmanager
def told_by(run_dir: Path) -> Iterator[None]:
    """Around what makes something of a run's events: those that ftkit did not write name the run.

    Raises:
      UsageError: an event lacks a field, or one is not what it has to be.
    """
    try:
        yield
    except MALFORMED as error:
        raise UsageError(
            f"{run_dir} holds events that ftkit did not write so: {error!r}"
        ) from error


def parse_event(line: bytes) -> dict[str, Any] | None:
    """The event of a line; None where it is none: it has to say what it is, and when."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None  # a full disk cut a line short, and the next was joined to it
    if not (isinstance(value, dict) and isinstance(value.get("kind"), str)):
        return None
    at = value.get("mono")
    try:
        return value if isinstance(at, float | int) and math.isfinite(at) else None
    except OverflowError:
        return None  # an integer beyond what a float holds
