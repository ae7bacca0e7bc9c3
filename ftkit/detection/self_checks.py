"""SelfChecks: has a suspect's node compute and remember something known, and adds what came of it. Pure.

A rank that is slow, holds other bits than its replicas, or is suspected to compute wrongly, may be the
victim of its node. Once it is
said, its node is checked beside one that nobody suspects, for the speed to be compared with; then
no more for `AGAIN_S`, and not more than `CHECKS_MAX` times in a job. The result is
evidence of the verdict for as long as that holds. The verdict does not wait for it.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from ftkit.core.errors import ProtocolError
from ftkit.core.ids import NodeId
from ftkit.core.verdict import Fault, Verdict
from ftkit.core.world import World
from ftkit.detection.node_health import NodeResult, against_history, complaints
from ftkit.detection.observations import Observation, WorldChanged
from ftkit.detection.signals import NodeChecked

#: What may come from a node that computes wrongly or slowly.
CHECKED: Final = frozenset({Fault.SLOW, Fault.SDC})
#: A node is not checked again for so long; it takes a core or two for about a second.
AGAIN_S: Final = 600.0
CHECKS_MAX: Final = 20
#: A check that has not come back by then never will.
GIVEN_UP_S: Final = 90.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """What came of a suspect's check."""

    node: NodeId
    healthy: bool | None
    """None: it could not be checked."""
    said: str
    """In words."""
    checks: tuple[Mapping[str, object], ...] = ()
    beside: NodeId | None = None
    """The node that it was compared with."""

    def to_json(self) -> dict[str, object]:
        return {
            "node": int(self.node),
            "healthy": self.healthy,
            "said": self.said,
            "checks": [dict(c) for c in self.checks],
            "beside": None if self.beside is None else int(self.beside),
        }


@dataclass(slots=True)
class _Open:
    asked_at: float
    peer: NodeId | None
    mine: NodeChecked | None = None
    theirs: NodeChecked | None = None


class SelfChecks:
    """Told what is seen and what is said; asked whom to check. Owned by one thread."""

    def __init__(self) -> None:
        self._world: World | None = None
        self._open: dict[NodeId, _Open] = {}
        self._done: dict[NodeId, tuple[float, Checked]] = {}
        self._orders: list[NodeId] = []
        self._ended: list[Checked] = []
        self._count = 0
        self._came: deque[NodeChecked] = deque()

    def ingest(self, observation: Observation) -> None:
        """Take in results, and who is where."""
        match observation:
            case WorldChanged(world=world):
                self._world = world
            case NodeChecked():
                self._came.append(observation)
            case _:
                pass

    def tick(self, now: float, verdicts: Sequence[Verdict]) -> list[Verdict]:
        """The verdicts, those on checked nodes with what came of it; orders checks of others."""
        while self._came:
            self._take(self._came.popleft())
        self._conclude(now)
        if self._world is None:
            return list(verdicts)
        node_of = {m.member: m.node for m in self._world.members}
        suspects = {
            node_of[v.member]
            for v in verdicts
            # Whether arithmetic that is suspected errs is what a check can tell.
            if v.fault in CHECKED
            and v.member in node_of
            and (not v.suspected or v.fault is Fault.SDC)
        }
        for node in sorted(suspects):
            self._ask(node, suspects, now)
        return [self._with_result(v, node_of.get(v.member)) for v in verdicts]

    def orders(self) -> list[NodeId]:
        """Nodes to be checked now, each once."""
        orders, self._orders = self._orders, []
        return orders

    def ended(self) -> list[Checked]:
        """What has come of checks since the last call."""
        ended, self._ended = self._ended, []
        return ended

    def _ask(self, node: NodeId, suspects: set[NodeId], now: float) -> None:
        known = self._done.get(node)
        recent = known is not None and now - known[0] < AGAIN_S
        if node in self._open or recent or self._count >= CHECKS_MAX:
            return
        assert self._world is not None, "there are suspects"
        others = sorted({m.node for m in self._world.members} - suspects)
        peer = others[0] if others else None
        self._count += 1
        self._open[node] = _Open(now, peer)
        self._orders += [n for n in (node, peer) if n is not None]

    def _take(self, came: NodeChecked) -> None:
        for node, one in self._open.items():
            if came.node == node:
                one.mine = came
            elif came.node == one.peer:
                one.theirs = came

    def _conclude(self, now: float) -> None:
        for node, one in list(self._open.items()):
            late = now - one.asked_at > GIVEN_UP_S
            if not late and (one.mine is None or (one.peer is not None and one.theirs is None)):
                continue
            del self._open[node]
            found = _judge(node, one)
            self._done[node] = now, found
            self._ended.append(found)

    def _with_result(self, verdict: Verdict, node: NodeId | None) -> Verdict:
        known = None if node is None else self._done.get(node)
        if verdict.fault not in CHECKED or known is None:
            return verdict
        concluded_at, found = known
        if verdict.since_s > concluded_at:
            return verdict  # what the node was like before is no evidence of it
        return replace(
            verdict,
            evidence={**verdict.evidence, "self_check": found.to_json()},
            reason=f"{verdict.reason}. Its node's self-check: {found.said}",
        )


def _judge(node: NodeId, one: _Open) -> Checked:
    """What to make of the suspect's result, and of that of the node beside it."""
    mine, theirs = _result(one.mine), _result(one.theirs)
    if mine is None:
        why = one.mine.error if one.mine is not None and one.mine.error else "it did not answer"
        return Checked(node=node, healthy=None, said=f"node {node} could not be checked: {why}")
    beside = one.peer if theirs is not None else None
    if theirs is not None:
        beside_it = replace(theirs, node=mine.node)
        mine = against_history(mine, [beside_it], usual_is=f"node {one.peer}'s")
    wrong = complaints([mine])
    with_whom = "" if beside is None else f"; compared with node {beside}"
    figures = "; ".join(f"{c.name} {c.note}" for c in mine.checks)
    said = "; ".join(wrong) if wrong else f"node {node} computes and remembers as it should"
    return Checked(
        node=node,
        healthy=not wrong,
        said=f"{said}{with_whom}" if wrong else f"{said} ({figures}{with_whom})",
        checks=tuple(
            {"name": c.name, "health": c.health.value, "note": c.note} for c in mine.checks
        ),
        beside=beside,
    )


def _result(came: NodeChecked | None) -> NodeResult | None:
    """The result as it was sent, or None where it is none."""
    if came is None or came.error:
        return None
    try:
        return NodeResult.from_json(came.result)
    except ProtocolError:
        return None
