"""Reach: whether a node of which the coordinator hears nothing is gone. Pure.

That nothing comes from a node may be the fault of the path from it to the coordinator. Before it
is taken for lost, two other nodes are asked to connect to its agent: the indirect probe of SWIM
(Das, Gupta and Motivala 2002, section 3.1). ::

    silent for node_s / 2    two others are asked, and again every node_s / 4
    for node_s               lost, unless one of them has reached it lately
    for node_s * 3 / 2       lost, whoever reaches it: nobody can give it orders
    refused twice            lost at once, unless somebody has reached it lately

So a node that is gone is taken for lost as soon as without this, and no node later than half of
`node_s` beyond that.

A refused connection is no silence but an answer: the machine's kernel says that nobody listens where
the agent did, so the agent is dead, and its ranks with it. One refusal has two others ask at once,
and a second one, whoever gets it, is proof: what a firewall refuses to one, it may let others do.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

from ftkit.core.ids import NodeId
from ftkit.detection.signals import ReachSeen

#: So many others are asked at a time.
VIA: Final = 2
#: In parts of node_s: silence after which others are asked, and between two questions; how long
#: an answer counts; and by how much it puts off the end.
_ASK, _AGAIN, _COUNTS, _LONGER = 0.5, 0.25, 0.5, 0.5
#: So many refusals, since the node was last connected, prove its agent's death.
_PROOF: Final = 2
#: Nobody takes longer than this to answer.
_LIMIT_S: Final = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ReachOrder:
    """The agent of `via` is to connect to that of `node`."""

    number: int
    node: NodeId
    via: NodeId
    limit_s: float


class Reach:
    """One for a job. Owned by the coordinator's thread."""

    def __init__(self, node_s: float) -> None:
        """Nodes are lost after `node_s` seconds of silence."""
        self._node_s = node_s
        self._number = 0
        #: Order -> the node in question, and when it was given.
        self._open: dict[int, tuple[NodeId, float]] = {}
        self._asked: dict[NodeId, float] = {}
        self._reached: dict[NodeId, float] = {}
        """When somebody was asked who then reached it: the moment that surely counts."""
        self._refusals: dict[NodeId, int] = {}

    def connected(self, node: NodeId) -> None:
        """The coordinator has a connection to it: what was refused before says nothing now."""
        self._refusals.pop(node, None)

    def refused(self, node: NodeId) -> None:
        """The coordinator, which hears others, tried to connect to it and was refused."""
        self._refusals[node] = self._refusals.get(node, 0) + 1

    def orders(
        self, silent: Mapping[NodeId, float], others: Collection[NodeId], now: float
    ) -> list[ReachOrder]:
        """Whom to ask now.

        Args:
          silent: each node -> for how long nothing has come from it.
          others: nodes that can be asked.
          now: the time.
        """
        self._asked = {n: at for n, at in self._asked.items() if silent.get(n, 0.0) > 0.0}
        self._open = {k: o for k, o in self._open.items() if now - o[1] <= self._node_s}
        found = list[ReachOrder]()
        for node, spent in silent.items():
            again = now - self._asked.get(node, float("-inf")) >= _AGAIN * self._node_s
            if not again or (spent <= _ASK * self._node_s and node not in self._refusals):
                continue
            # The next ones by number, so that many silent nodes do not all ask the same two.
            nearest = sorted((n for n in others if n != node), key=lambda n: (n < node, n))
            for via in nearest[:VIA]:
                self._number += 1
                self._open[self._number] = (node, now)
                limit_s = min(_LIMIT_S, _AGAIN * self._node_s)
                found.append(ReachOrder(number=self._number, node=node, via=via, limit_s=limit_s))
                self._asked[node] = now
        return found

    def take(self, seen: ReachSeen) -> None:
        """One that was asked has answered. Whoever was not is passed over."""
        node, asked = self._open.pop(seen.order, (None, 0.0))
        if node != seen.node:
            return
        if seen.reached:
            self._reached[node] = max(asked, self._reached.get(node, asked))
        elif seen.refused and node in self._refusals:
            self.refused(node)

    def lost(self, silent: Mapping[NodeId, float], now: float) -> frozenset[NodeId]:
        """The nodes that are taken for lost, of those that are silent for so long."""
        return frozenset(
            n
            for n, spent in silent.items()
            if spent > self._allowed_s(n, now) or self.is_proved(n, now)
        )

    def is_proved(self, node: NodeId, now: float) -> bool:
        """Whether it is known, and not only to be feared, that the agent there is dead."""
        return self._refusals.get(node, 0) >= _PROOF and not self._is_reached(node, now)

    def _allowed_s(self, node: NodeId, now: float) -> float:
        return (1 + _LONGER) * self._node_s if self._is_reached(node, now) else self._node_s

    def _is_reached(self, node: NodeId, now: float) -> bool:
        return now - self._reached.get(node, float("-inf")) <= _COUNTS * self._node_s
