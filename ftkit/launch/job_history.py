"""JobHistory: the coordinator's part in the history: it reads it at the start and adds to it.

A thread of its own does the reading and writing: a history that is slow, or gone, holds up no
judgement, and is said once.
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
from ftkit.detection.signals import NodeScored
from ftkit.launch.config import JobConfig
from ftkit.launch.history import History, fleet

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
          tell: where an event is written when the history fails.
        """
        self._history = History(config.history, config.job)
        self._chain = hashlib.blake2b(
            "\x1f".join((*config.command, config.checkpoint_dir)).encode(), digest_size=8
        ).hexdigest()
        self._scored = scored
        self._tell = tell
        self._names: Mapping[NodeId, str] = {}
        self._fleet: Offenders | None = None
        self._failed = False
        self._inbox: queue.SimpleQueue[tuple[str, dict[str, Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="ftkit-history", daemon=True)
        self._thread.start()

    def begin(self, names: Mapping[NodeId, str]) -> None:
        """The job begins on these machines."""
        self._names = dict(names)
        nodes = sorted(set(names.values()))
        self._inbox.put(("job", {"chain": self._chain, "nodes": nodes}))

    def verdict(self, verdict: Verdict, node: NodeId | None) -> None:
        """Something was found of a member on `node`."""
        died = verdict.fault is Fault.EXITED and verdict.evidence.get("signal") is not None
        name = None if node is None else self._names.get(node)
        if name is not None and (died or verdict.fault in OF_NODES):
            self._inbox.put(("fault", {"node": name, "fault": verdict.fault.value}))

    def end(self, *, code: int, trained: bool) -> None:
        """The job has ended. Waits for the record of it, for some seconds at most."""
        self._inbox.put(("end", {"code": code, "trained": trained}))
        self.close()

    def close(self) -> None:
        """Write what is left, and end. Safe to call twice."""
        self._inbox.put(None)
        self._thread.join(CLOSE_S)

    def _run(self) -> None:
        """(history thread) Write what comes, and judge whom it speaks of."""
        while (item := self._inbox.get()) is not None:
            kind, fields = item
            now = time.time()
            try:
                if self._fleet is None:
                    self._fleet = fleet(self._history.read(), OffenderConfig())
                self._history.append(kind, at=now, **fields)
            except FtkitError as error:
                self._complain(str(error))
            if kind == "end":
                continue
            known = self._fleet if self._fleet is not None else Offenders()
            self._fleet = known
            if kind == "job":
                for node in fields["nodes"]:
                    known.seen(node, now)
                self._score(known, now)
            else:
                known.fault(fields["node"], now)
                self._score(known, now, only=fields["node"])

    def _score(self, known: Offenders, now: float, *, only: str | None = None) -> None:
        for node, name in self._names.items():
            if only is not None and name != only:
                continue
            score = known.score(name, now)
            self._scored(
                NodeScored(
                    node=node,
                    name=name,
                    at=time.monotonic(),
                    faults=score.faults,
                    recent=score.recent,
                    rate_per_day=score.rate_per_day,
                    fleet_per_day=score.fleet_per_day,
                    factor=known.config.factor,
                    certainty=score.certainty,
                    offender=score.offender,
                )
            )

    def _complain(self, reason: str) -> None:
        if not self._failed:
            self._failed = True
            self._tell("history-failed", reason=reason)
            logger.warning("%s; the job goes on without it", reason)
