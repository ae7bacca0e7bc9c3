"""Resources: once a second an agent looks at what its node has left.

On a thread of its own: a file system that does not answer holds up nothing else.
"""

import os
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import psutil

from ftkit.core.clock import MonotonicClock
from ftkit.core.ids import NodeId
from ftkit.core.inventory import Part
from ftkit.detection.signals import NodeSeen
from ftkit.launch.config import JobConfig

EVERY_S = 1.0

#: Between two questions of a coordinator for the nodes' wall clocks.
CLOCK_S = 5.0

#: In a drill of leaks, the bytes of memory that a node has left, as if there were no more.
LEFT = "FTKIT_DRILL_MEMORY"

#: What is to be left where events and logs go.
EVENTS_BYTES = 16 << 20


class Resources:
    """Of one node. Owns its thread."""

    def __init__(
        self,
        config: JobConfig,
        node: NodeId,
        *,
        state_bytes: Callable[[], int],
        seen: Callable[[NodeSeen], None],
    ) -> None:
        """Begin to look.

        Args:
          config: the job: where it writes.
          node: this one.
          state_bytes: of the whole job, as far as is known here: what a checkpoint takes.
          seen: told, on the thread, once a second.
        """
        self._config = config
        self._node = node
        self._state_bytes = state_bytes
        self._seen = seen
        self._clock = MonotonicClock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ftkit-resources", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Look no further. Does not wait for a disk that hangs."""
        self._stop.set()

    def _run(self) -> None:
        while not self._stop.wait(EVERY_S):
            self._seen(self.look())

    def look(self) -> NodeSeen:
        """What there is now. Blocks for as long as its file systems take."""
        due = {self._config.run_dir: EVENTS_BYTES}
        store = self._config.checkpoint_dir
        if store and "://" not in store:
            due[store] = self._state_bytes()
        available = psutil.virtual_memory().available
        if LEFT in self._config.env:
            available = min(available, int(self._config.env[LEFT]))
        return NodeSeen(
            node=self._node,
            at=self._clock.now(),
            available_bytes=available,
            pressure=pressure(),
            disks={p: [free, n] for p, n in due.items() if (free := free_bytes(p)) is not None},
        )


def free_bytes(path: str) -> int | None:
    """What this user may still write where `path` is, or will be; None where nobody can say."""
    for folder in (Path(path), *Path(path).parents):
        try:
            found = os.statvfs(folder)
        except FileNotFoundError:
            continue  # it is made by the first who writes
        except OSError:
            return None
        return found.f_bavail * found.f_frsize
    return None


def pressure(folder: Path = Path("/proc/pressure")) -> dict[str, float]:
    """Share of the last ten seconds that some process waited for cpu, io, memory; {} if unknown."""
    found = {}
    for name in ("cpu", "io", "memory"):
        try:
            words = (folder / name).read_text().split()
            (share,) = [w.removeprefix("avg10=") for w in words[:5] if w.startswith("avg10=")]
            found[name] = float(share) / 100
        except (OSError, ValueError):
            continue  # a kernel without it, or built to be asked for it
    return found


def state_bytes(copies: Iterable[Mapping[str, Any]]) -> int:
    """Bytes of the whole state that these parts of snapshots (`Copy.to_json`) are of; 0: unknown."""
    by_step: dict[int, dict[str, int]] = {}
    for copy in copies:
        part = Part.from_json(copy["part"])
        by_step.setdefault(int(copy["step"]), {})[part.layout] = part.total
    return max((sum(layouts.values()) for layouts in by_step.values()), default=0)
