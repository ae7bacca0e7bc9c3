"""JobHistory: the coordinator's part in the history: it reads it at the start and adds to it.

A thread of its own does the reading and writing: a history that is slow, or gone, holds up no
judgement, and is said once. What a fault makes of a node is reckoned at once, once the history has
been read: where its rank starts anew may depend on it.
"""

import hashlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from ftkit.core.errors import FtkitError
from ftkit.core.ids import NodeId
from ftkit.core.verdict import Fault, Verdict
from ftkit.detection.offenders import OffenderConfig, Offenders
from ftkit.detection.retries import retry_stats
from ftkit.detection.signals import NodeScored
from ftkit.launch.config import JobConfig
from ftkit.launch.history import History, Record, attempts, fleet

logger = logging.getLogger(__name__)

#: Faults that speak of a node. An exit code, an imbalance or a hard batch speak of the script.
OF_NODES = frozenset(
    {
        Fault.STOPPED,
        Fault.HANG_BUSY,
        Fault.HANG_BLOCKED,
        Fault.NODE_LOST,
        Fault.SLOW,
        Fault.SLOW_COMM,
        Fault.SLOW_IO,
        Fault.SDC,
        Fault.FLAPPING,
    }
)

#: What is found on one node within this time is one event: eight ranks die of one cause.
TOGETHER_S = 10.0

#: How long the end of a job waits for its last record.
CLOSE_S = 5.0


class JobHistory:
    """Of one job's coordinator. Call from its thread."""

    def __init__(
        self,
        config: JobConfig,
        *,
        scored: Callable[[NodeScored], None],
        tell: Callable[..., None],
    ) -> None:
        """Begin to listen.

        Args:
          config: the job, with a `history`.
          scored: told, on the history's thread, what is known of each node.
          tell: where events are written: what there is of a history, and when it fails.
        """
        self._history = History(config.history, config.job)
        self._chain = hashlib.blake2b(
            "\x1f".join((*config.command, config.checkpoint_dir)).encode(), digest_size=8
        ).hexdigest()
        self._scored = scored
        self._tell = tell
        self._names: Mapping[NodeId, str] = {}
        self._failed = False
        self._last_fault: dict[NodeId, float] = {}
        """When what was counted last on each node began."""
        self._lock = threading.Lock()
        # ---- under the lock ----
        self._fleet: Offenders | None = None
        """None until the history has been read."""
        self._early: list[str] = []
        """Nodes that failed before that."""
        self._inbox: queue.SimpleQueue[tuple[str, dict[str, Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="ftkit-history", daemon=True)
        self._thread.start()

    def begin(self, names: Mapping[NodeId, str]) -> None:
        """The job begins on these machines."""
        self._names = dict(names)
        nodes = sorted(set(names.values()))
        self._inbox.put(("job", {"chain": self._chain, "nodes": nodes}))

    def verdict(self, verdict: Verdict, node: NodeId | None) -> list[NodeScored]:
        """Something was found of a member on `node`.

        Returns what that makes of the node; nothing where it is no fault of a node, is part of
        one that was counted, or while the history is being read: `scored` is told then.
        """
        died = verdict.fault is Fault.EXITED and verdict.evidence.get("signal") is not None
        name = None if node is None else self._names.get(node)
        shared = verdict.fault is Fault.SLOW_IO and verdict.evidence.get("others")
        if name is None or shared or not (died or verdict.fault in OF_NODES):
            return []  # storage that is slow for all says nothing of one
        if verdict.evidence.get("ours"):
            return []  # what it was killed for was counted, if it was a fault of the node
        assert node is not None, "it has a name"
        before = self._last_fault.get(node)
        if before is not None and abs(verdict.since_s - before) <= TOGETHER_S:
            return []
        self._last_fault[node] = verdict.since_s
        found = []
        with self._lock:
            if self._fleet is not None:
                self._fleet.fault(name, time.time())
                found = self._scores(self._fleet, only=name)
            else:
                self._early.append(name)
        self._inbox.put(("fault", {"node": name, "fault": verdict.fault.value}))
        return found

    def end(self, *, code: int, trained: bool) -> None:
        """The job has ended. Waits for the record of it, for some seconds at most."""
        self._inbox.put(("end", {"code": code, "trained": trained}))
        self.close()

    def close(self) -> None:
        """Write what is left, and end. Safe to call twice."""
        self._inbox.put(None)
        self._thread.join(CLOSE_S)

    def _run(self) -> None:
        """(history thread) Read what there is, then write what comes."""
        while (item := self._inbox.get()) is not None:
            kind, fields = item
            now = time.time()
            try:
                if self._fleet is None:
                    records = self._history.read()
                    self._tell("history", **_told(records))
                    self._begin(fleet(records, OffenderConfig()), now)
                self._history.append(kind, at=now, **fields)
            except FtkitError as error:
                self._complain(str(error))
                if self._fleet is None:
                    self._begin(Offenders(), now)

    def _begin(self, known: Offenders, now: float) -> None:
        """Judge by `known` from here on, and tell of every node of this job."""
        for name in self._names.values():
            known.seen(name, now)
        # What came while it was read; each is still in the inbox, to be written.
        with self._lock:
            for name in self._early:
                known.fault(name, now)
            self._early.clear()
            self._fleet = known
            found = self._scores(known)
        for score in found:
            self._scored(score)

    def _scores(self, known: Offenders, *, only: str | None = None) -> list[NodeScored]:
        """(under the lock) What is to be thought of the nodes of this job now."""
        scores = [
            (node, known.score(name, time.time()))
            for node, name in self._names.items()
            if only is None or name == only
        ]
        return [
            NodeScored(
                node=node,
                name=score.node,
                at=time.monotonic(),
                faults=score.faults,
                recent=score.recent,
                rate_per_day=score.rate_per_day,
                fleet_per_day=score.fleet_per_day,
                factor=known.config.factor,
                certainty=score.certainty,
                offender=score.offender,
            )
            for node, score in scores
        ]

    def _complain(self, reason: str) -> None:
        if not self._failed:
            self._failed = True
            self._tell("history-failed", reason=reason)
            logger.warning("%s; the job goes on without it", reason)


def _told(records: list[Record]) -> dict[str, Any]:
    """What a history holds, in figures."""
    starts = attempts(records)
    return {
        "jobs": len(starts),
        "faults": sum(r["kind"] == "fault" for r in records),
        "retries": retry_stats(starts).to_json(),
    }
