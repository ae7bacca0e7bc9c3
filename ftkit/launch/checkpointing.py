"""Checkpointing: which snapshot goes to disk, and how far the nodes are with it (pure).

The ranks mark the snapshots that are due; each node's persister does what the order says and
reports how far it is; the coordinator moves the order on when every node is there. ::

            all began         there is room        all wrote          it is committed
    BEGIN ---------> CLEAR ----------------> WRITE ---------> COMMIT ----------------> none
      |  a node failed |  or was lost          |                 |
      +----------------+-----------------------+-----------------+--> none: the step is given up

Orders and reports are levels, as all facts are: either may be lost or repeated. No node begins
an attempt before it has ended the one before, so what CLEAR removes nobody writes any more.
A coordinator that dies takes its order with it, and the step is given up, or committed already.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

from ftkit.checkpoint.persist.division import writers
from ftkit.core.errors import ProtocolError
from ftkit.core.ids import NodeId, Step
from ftkit.core.inventory import Copy, Inventory

#: Attempts that one coordinator may order.
ATTEMPTS_MAX = 1_000_000


class Stage(IntEnum):
    """How far an attempt is."""

    NOTHING = 0
    BEGIN = 1
    """Every node ends what it did before, writer or not; writers pin their parts."""
    CLEAR = 2
    """The committer makes room for the step."""
    WRITE = 3
    """Every writer writes its boxes, and leaves its fragment of the manifest."""
    COMMIT = 4
    """The committer joins the fragments, and cleans up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """One attempt at one checkpoint, as the nodes are told of it."""

    attempt: int
    """Rises with every attempt, over all coordinators."""
    step: Step
    stage: Stage
    committer: NodeId
    writers: tuple[NodeId, ...]
    copies: tuple[Copy, ...]
    """All parts to be written; who writes what follows from them (`division`)."""

    @property
    def nodes(self) -> frozenset[NodeId]:
        """Those who have something to do."""
        return frozenset({self.committer, *self.writers})

    @property
    def bytes(self) -> int:
        """Of the tensors that are to be written."""
        return sum({c.part.layout: c.part.total for c in self.copies}.values())

    def to_json(self) -> dict[str, object]:
        return {
            "attempt": self.attempt,
            "step": self.step,
            "stage": int(self.stage),
            "committer": self.committer,
            "writers": list(self.writers),
            "copies": [c.to_json() for c in self.copies],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Order":
        """Read what `to_json` wrote. Raises ProtocolError on anything else."""
        try:
            return cls(
                attempt=int(value["attempt"]),
                step=Step(int(value["step"])),
                stage=Stage(value["stage"]),
                committer=NodeId(int(value["committer"])),
                writers=tuple(NodeId(int(n)) for n in value["writers"]),
                copies=tuple(Copy.from_json(c) for c in value["copies"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ProtocolError(f"not an order to write a checkpoint: {value!r:.200}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """How far one node is."""

    attempt: int = 0
    """The one it takes part in."""
    done: Stage = Stage.NOTHING
    """The last stage of it that it has done."""
    error: str = ""
    """Why it will do no more of it; empty while it does."""
    due: tuple[Copy, ...] = ()
    """Its parts that are to go to disk."""
    written: int = 0
    """Bytes of tensors it has written in this attempt."""

    def to_json(self) -> dict[str, object]:
        return {
            "attempt": self.attempt,
            "done": int(self.done),
            "error": self.error,
            "due": [c.to_json() for c in self.due],
            "written": self.written,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Report":
        """Read what `to_json` wrote. Raises ProtocolError on anything else."""
        try:
            return cls(
                attempt=int(value["attempt"]),
                done=Stage(value["done"]),
                error=str(value["error"]),
                due=tuple(Copy.from_json(c) for c in value["due"]),
                written=int(value["written"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ProtocolError(f"not a report of a persister: {value!r:.200}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderEnd:
    """An attempt that ended."""

    step: Step
    failed: str
    """Why there is no checkpoint; empty when there is."""


def judge(
    order: Order | None,
    reports: Mapping[NodeId, Report],
    *,
    last_attempt: int,
    due: Iterable[Copy] | None = None,
) -> tuple[Order | None, OrderEnd | None]:
    """The order as it should be now, and the attempt that ended by that.

    Args:
      order: as it stands.
      reports: of every node that can be reached; a lost one is not among them.
      last_attempt: the newest attempt ever ordered by this coordinator.
      due: what is to go to disk; None for what the reports say is due.

    Returns:
      The order to send, None while there is nothing to write, and the outcome of `order` when
      it has ended. Every node takes its pins off a snapshot that is no longer ordered.
    """
    if order is None:
        if due is None:
            due = (c for r in reports.values() for c in r.due)
        return _next(reports, Inventory(copies=tuple(due)), last_attempt), None
    if lost := sorted(order.nodes - reports.keys()):
        return None, OrderEnd(step=order.step, failed=f"node {lost[0]} was lost")
    here = {n: r for n, r in reports.items() if n in order.nodes and r.attempt == order.attempt}
    for node, report in sorted(here.items()):
        if report.error:
            return None, OrderEnd(step=order.step, failed=f"node {node}: {report.error}")
    # The committer alone can be ahead: what it was to write had been committed before.
    if order.committer in here and here[order.committer].done is Stage.COMMIT:
        return None, OrderEnd(step=order.step, failed="")
    if len(here) < len(order.nodes) or order.stage is Stage.COMMIT:
        return order, None
    # Who has nothing to write now may have had before, and still be at it.
    if order.stage is Stage.BEGIN and any(r.attempt != order.attempt for r in reports.values()):
        return order, None
    if all(r.done >= order.stage for r in here.values()):
        return replace(order, stage=Stage(order.stage + 1)), None
    return order, None


def _next(reports: Mapping[NodeId, Report], due: Inventory, last_attempt: int) -> Order | None:
    """Begin with the newest snapshot of which every part is due."""
    newest = due.newest_complete()
    if newest is None:
        return None
    generation, step = newest
    copies = tuple(
        sorted(
            (c for c in due.at(step) if c.generation >= generation),
            key=lambda c: (c.node, c.seat, c.generation),
        )
    )
    return Order(
        attempt=last_attempt + 1,
        step=step,
        stage=Stage.BEGIN,
        committer=min(reports),
        writers=tuple(sorted(writers(copies))),
        copies=copies,
    )
