"""LivePage: what a browser asks for, made from a run's folder at the moment it is asked.

Nothing is read while nobody looks, and several viewers share one look. The run is only read, so
that neither its ranks nor its coordinator can be held up.
"""

import threading
import time
from pathlib import Path

from ftkit.detection.bundle import paragraph
from ftkit.launch.event_tail import EventTail
from ftkit.launch.incidents import read_bundles
from ftkit.launch.ui.boards import read_rows
from ftkit.launch.ui.page import parts
from ftkit.launch.ui.view import UiView

#: Between two looks at the run's files, however many ask.
LOOK_S = 0.5
_BUNDLES_SHOWN = 10


class LivePage:
    """One run. Any thread may ask; one at a time looks."""

    def __init__(self, run_dir: Path, *, look_s: float = LOOK_S) -> None:
        """Follow `run_dir`. Reads nothing yet."""
        self._run_dir = run_dir
        self._look_s = look_s
        self._lock = threading.Lock()
        self._tail, self._view = EventTail(run_dir), UiView()
        self._bundles: list[tuple[int, str]] = []
        self._looked_at = float("-inf")
        # Above those of any viewer that was at this address before; a browser counts to 2**53.
        self._revision = time.time_ns() // 1000
        self._parts: dict[str, tuple[int, str]] = {}
        """Element id -> (the revision in which it changed last, its HTML)."""
        self._data: dict[str, object] = {}

    def answer(self, seen: int) -> dict[str, object]:
        """The run now, as JSON; `parts` holds those that changed after revision `seen`.

        Blocks for as long as it takes to read what was written since the last look. Raises OSError
        when the run's files cannot be read.
        """
        with self._lock:
            if time.monotonic() - self._looked_at >= self._look_s:
                self._look()
                self._looked_at = time.monotonic()
            return {
                "name": self._run_dir.name,
                "revision": self._revision,
                "data": self._data,
                "parts": {i: html for i, (at, html) in self._parts.items() if at > seen},
            }

    def _look(self) -> None:
        events = self._tail.poll()
        for event in events:
            self._view.feed(event)
        if any(event.get("kind") in ("incident", "bundle", "end") for event in events):
            kept = read_bundles(self._run_dir)[-_BUNDLES_SHOWN:]
            self._bundles = [(int(i.get("number", 0)), paragraph(i, nodes)) for i, nodes in kept]
        rows = {} if self._view.run.ended else read_rows(self._view.boards)
        ranks = self._view.ranks(rows, time.monotonic_ns())
        self._data = self._view.to_json(ranks)
        self._revision += 1
        for name, html in parts(self._view, ranks, self._bundles).items():
            if name not in self._parts or self._parts[name][1] != html:
                self._parts[name] = self._revision, html
