"""Incidents: the coordinator's part: when one begins, who is looked at, and what is kept of it.

The folder of an incident, RUN_DIR/incidents/N/, is begun the moment something is found::

    incident.json          verdicts with their evidence, who waits for whom, the plan, decisions
    incident.txt           the same for people
    node-K.json            what agent K found: processes, pressure, stacks, newest collectives
    stacks-seat-S.txt      the stacks of the culprit and of one that waits for it

Nothing waits for it. A coordinator or agent that dies leaves what it had written by then.
"""

import json
import logging
import queue
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ftkit.core.ids import MemberId, NodeId
from ftkit.core.verdict import ACCUSES_NOBODY, Fault, Verdict
from ftkit.core.world import World
from ftkit.detection.bundle import paragraph, waits
from ftkit.launch.examiner import INCIDENTS, INCIDENTS_MAX
from ftkit.launch.whole_file import write_whole

logger = logging.getLogger(__name__)

#: What is found within this time of the last finding belongs to the same incident.
TOGETHER_S = 10.0
#: Ranks whose stacks are wanted, at most: culprits first.
_CLOSELY_MAX = 3
_VERDICTS_MAX = 64

#: What is worth a look at processes and stacks: all that accuses, and a job that stands still.
#: What is known of an offender comes from other jobs.
_LOOKED_AT = frozenset(Fault) - ACCUSES_NOBODY - {Fault.OFFENDER} | {Fault.STALL}


class Incidents:
    """Owned by the coordinator's thread; a thread of its own writes."""

    def __init__(self, run_dir: Path) -> None:
        """Go on after the incidents that are there."""
        self._root = run_dir / INCIDENTS
        numbers = [int(p.name) for p in self._root.glob("*") if p.name.isdigit()]
        self._number = max(numbers, default=0)
        self._current: dict[str, Any] | None = None
        self._looked: set[MemberId] = set()
        self._checking: dict[NodeId, dict[str, Any]] = {}
        """Nodes that are being checked -> the incident for which they are."""
        self._touched = float("-inf")
        self._queue: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def take(
        self, fresh: Sequence[Verdict], world: World | None, plan: Mapping[str, Any], now: float
    ) -> dict[str, Any] | None:
        """Note new verdicts. Returns what to tell the agents, when there is something to look at."""
        found = [v for v in fresh if v.fault in _LOOKED_AT]
        if not found:
            return None
        if self._current is None or now - self._touched > TOGETHER_S:
            if self._number >= INCIDENTS_MAX:
                return None
            self._number += 1
            self._current = {"number": self._number, "verdicts": [], "plan": plan, "decisions": []}
            self._looked = set()
        self._touched = now
        told = self._current["verdicts"]
        told += [_told(v) for v in found][: _VERDICTS_MAX - len(told)]
        self._keep(self._current)
        if all(v.member in self._looked for v in found):
            return None  # what they looked like when it was found is what counts
        self._looked.update(v.member for v in found)
        return {
            "type": "look",
            "incident": self._number,
            "members": _closely(found, world),
        }

    def decided(self, action: str, reason: str, now: float) -> None:
        """A decision was made: it belongs to the incident that is going on."""
        if self._current is not None and now - self._touched <= TOGETHER_S:
            self._current["decisions"].append({"action": action, "reason": reason})
            self._keep(self._current)

    def checking(self, node: NodeId) -> None:
        """A node is to be checked because of what was found now."""
        if self._current is not None:
            self._checking[node] = self._current

    def checked(self, found: Mapping[str, Any]) -> None:
        """A suspect's node was checked: it belongs to the incident that asked, if any did."""
        incident = self._checking.pop(NodeId(int(found["node"])), None)
        if incident is not None:
            incident.setdefault("self_checks", []).append(dict(found))
            self._keep(incident)

    def close(self) -> None:
        """Write what is left, for a moment."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(timeout=1.0)
            self._thread = None

    def _keep(self, incident: Mapping[str, Any]) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="ftkit-incidents", daemon=True)
            self._thread.start()
        self._queue.put(json.loads(json.dumps(incident)))

    def _run(self) -> None:
        while (told := self._queue.get()) is not None:
            folder = self._root / str(told["number"])
            told["waits"] = waits(told["verdicts"])
            try:
                folder.mkdir(parents=True, exist_ok=True)
                write_whole(folder / "incident.json", json.dumps(told))
                write_whole(folder / "incident.txt", paragraph(told, []) + "\n")
            except OSError as error:
                logger.debug("incident %s is not written: %s", told["number"], error)


def _told(verdict: Verdict) -> dict[str, Any]:
    return {
        "fault": str(verdict.fault),
        "member": verdict.member,
        "seat": verdict.seat,
        "peer": verdict.peer,
        "suspected": verdict.suspected,
        "confidence": verdict.confidence,
        "reason": verdict.reason,
        "since_s": verdict.since_s,
        "evidence": dict(verdict.evidence),
    }


def _closely(found: Sequence[Verdict], world: World | None) -> list[MemberId]:
    """Whose stacks are wanted: the culprits, and one that waits for them."""
    culprits = list(dict.fromkeys(v.member for v in found))[: _CLOSELY_MAX - 1]
    waiting: list[Any] = []
    for verdict in found:
        waiters = verdict.evidence.get("waiters")
        if isinstance(waiters, list):
            waiting += [w["member"] for w in waiters]
    others = [m.member for m in world.members] if world else []
    victim = next((m for m in [*waiting, *others] if m not in culprits), None)
    return culprits if victim is None else [*culprits, MemberId(victim)]


def read_bundles(run_dir: Path) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Every incident of a run with what its nodes told, in order. What is damaged is left out."""
    found = []
    root = run_dir / INCIDENTS
    for folder in sorted(
        (p for p in root.glob("*") if p.name.isdigit()), key=lambda p: int(p.name)
    ):
        incident = _read(folder / "incident.json") or {"number": int(folder.name)}
        nodes = [n for p in sorted(folder.glob("node-*.json")) if (n := _read(p))]
        if len(incident) > 1 or nodes:
            found.append((incident, nodes))
    return found


def _read(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
