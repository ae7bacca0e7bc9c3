"""Examiner: an agent's part of an incident: stacks, processes, newest collectives, pressure.

A thread of its own does it, so that a slow disk or a rank that does not answer holds up nothing;
an incident that comes while others are being looked at beyond a few is passed over. Everything
is bounded: bytes, seconds, and how many incidents a job may leave.
"""

import json
import logging
import queue
import shutil
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftkit.core.ids import MemberId, NodeId, Seat
from ftkit.detection import stacks
from ftkit.detection.process import process_facts
from ftkit.launch.resources import pressure
from ftkit.launch.whole_file import write_whole

logger = logging.getLogger(__name__)

#: Folder of a run's incidents.
INCIDENTS = "incidents"
#: A job that keeps failing must not fill the disk with accounts of it.
INCIDENTS_MAX = 200
#: py-spy takes some 0.1 s; what takes longer is given up.
_PY_SPY_S = 3.0
_WAITING_MAX = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Patient:
    """A rank of this node."""

    seat: Seat
    member: MemberId
    pid: int
    alive: bool
    closely: bool
    """Whether its stacks are wanted: it is at fault, or the one that waits for that."""


class Examiner:
    """Owned by the agent. `examine` returns at once."""

    def __init__(
        self, node: NodeId, run_dir: Path, shm_dir: Path, done: Callable[[int], None]
    ) -> None:
        """Start the thread; it writes below `run_dir` and reads dumps in `shm_dir`.

        `done` is called on it with the number of each incident that is written.
        """
        self._done = done
        self._node = node
        self._root = run_dir / INCIDENTS
        self._shm_dir = shm_dir
        self._queue: queue.Queue[tuple[int, Sequence[Patient], Mapping[int, Any]] | None]
        self._queue = queue.Queue(_WAITING_MAX)
        self._thread = threading.Thread(target=self._run, name="ftkit-examiner", daemon=True)
        self._thread.start()

    def examine(self, number: int, patients: Sequence[Patient], records: Mapping[int, Any]) -> None:
        """Look at these ranks for incident `number`; `records` are their newest collectives."""
        try:
            self._queue.put_nowait((number, patients, records))
        except queue.Full:
            logger.debug("incident %s is not looked at: others still are", number)

    def close(self) -> None:
        """Finish what is being looked at, for a moment; then leave it. Safe to call twice."""
        try:
            self._queue.put_nowait(None)
        except queue.Full:
            return
        self._thread.join(timeout=1.0)

    def _run(self) -> None:
        while (task := self._queue.get()) is not None:
            number, patients, records = task
            try:
                self._write(number, self._look(patients, records))
                self._done(number)
            except (OSError, ValueError, KeyError) as error:
                logger.debug("incident %s is not written: %s", number, error)

    def _look(self, patients: Sequence[Patient], records: Mapping[int, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {"node": self._node, "pressure": pressure(), "stacks": {}}
        facts = {p.seat: process_facts(p.pid) if p.alive else None for p in patients}
        found["processes"] = {
            str(p.seat): (told.to_json() | _status(p.pid)) if (told := facts[p.seat]) else None
            for p in patients
        }
        for p in patients:
            if p.closely and p.alive:
                text = stacks.look(p.pid, self._shm_dir, p.member)
                frames = _py_spy(p.pid)  # also of one that is stopped, and answers to nobody
                if text or frames:
                    found["stacks"][str(p.seat)] = {"text": text, "py_spy": frames}
        found["collectives"] = {str(seat): told for seat, told in records.items()}
        return found

    def _write(self, number: int, found: Mapping[str, Any]) -> None:
        folder = self._root / str(number)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"node-{self._node}.json"
        if path.exists():
            # Looked at before, for somebody else: those stacks are of then.
            before = json.loads(path.read_text())
            found = {**found, "stacks": {**found["stacks"], **before["stacks"]}}
        write_whole(path, json.dumps(found))
        for seat, told in found["stacks"].items():
            write_whole(
                folder / f"stacks-seat-{seat}.txt", told.get("text", "") + told.get("py_spy", "")
            )


def _status(pid: int) -> dict[str, str]:
    """Of /proc/PID/status what says how a process fares."""
    wanted = ("Threads", "VmPeak", "VmRSS", "VmSwap", "SigPnd", "voluntary_ctxt_switches")
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    fields = (line.split(":", 1) for line in lines if ":" in line)
    return {name: value.strip() for name, value in fields if name in wanted}


def _py_spy(pid: int) -> str:
    """Python frames by py-spy, if it is installed.

    Native ones it can only tell of a process that it stops, and whoever is looked at goes on.
    """
    tool = shutil.which("py-spy")
    if tool is None:
        return ""
    try:
        done = subprocess.run(
            [tool, "dump", "--nonblocking", "--pid", str(pid)],
            capture_output=True,
            timeout=_PY_SPY_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode(errors="replace")[: stacks.BYTES_MAX]
