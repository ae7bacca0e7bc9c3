"""EventTail: what was added to a run's event files since the last look."""

from pathlib import Path
from typing import Any

from ftkit.core.trace import parse_event


class EventTail:
    """Reads what was added to a run's event files since the last time. One thread's object."""

    def __init__(self, run_dir: Path, *, files: str = "*.jsonl", from_now: bool = False) -> None:
        """Follow `run_dir`/events; neither the folder nor one of the `files` need exist yet.

        `from_now` leaves out what is there already.
        """
        self._events = run_dir / "events"
        self._files = files
        self._read_to: dict[Path, int] = {}
        self.unreadable = 0
        """Whole lines that were no events."""
        if from_now:
            self._read_to = {path: path.stat().st_size for path in self._events.glob(files)}

    def poll(self) -> list[dict[str, Any]]:
        """The new events of all files, in order of time. A half-written line waits for its end."""
        events = []
        for path in sorted(self._events.glob(self._files)):
            events += self._poll_file(path)
        return sorted(events, key=lambda e: float(e["mono"]))

    def _poll_file(self, path: Path) -> list[dict[str, Any]]:
        start = self._read_to.get(path, 0)
        with path.open("rb") as file:
            file.seek(start)
            data = file.read()
        end = data.rfind(b"\n") + 1
        self._read_to[path] = start + end
        events = []
        for line in data[:end].splitlines():
            event = parse_event(line)
            if event is None:
                self.unreadable += 1
            else:
                events.append(event)
        return events
