"""Flapping: nodes that come and go. Pure.

Each time a node was away is a penalty of 1, which halves every `HALF_LIFE_S` (as routers damp
routes that flap, RFC 2439). From `FROM` on the node is flapping, and stays so until the penalty
has fallen below `UNTIL`: one incident, not one for each time.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from ftkit.core.ids import NodeId
from ftkit.core.verdict import Fault, Verdict
from ftkit.core.world import World
from ftkit.detection.observations import Observation, WorldChanged
from ftkit.detection.signals import NodeGap

HALF_LIFE_S = 300.0
#: Reached with the third time within some minutes.
FROM, UNTIL = 2.5, 1.0


@dataclass(slots=True)
class _Node:
    penalty: float = 0.0
    at: float = 0.0
    first: float = 0.0
    times: int = 0
    flapping: bool = False

    def now(self, now: float) -> float:
        return self.penalty * math.exp2(-max(0.0, now - self.at) / HALF_LIFE_S)


class Flapping:
    """One detector of the panel. Owned by one thread."""

    HEARS: ClassVar[frozenset[type]] = frozenset({NodeGap, WorldChanged})

    def __init__(self) -> None:
        self._world: World | None = None
        self._nodes: dict[NodeId, _Node] = {}

    def ingest(self, observation: Observation) -> None:
        """Take in that a node was away."""
        match observation:
            case WorldChanged(world=world):
                self._world = world
            case NodeGap(node=node, at=at):
                one = self._nodes.setdefault(node, _Node(first=at))
                one.penalty, one.at, one.times = one.now(at) + 1, at, one.times + 1
            case _:
                pass

    def tick(self, now: float) -> list[Verdict]:
        """One verdict for each node that flaps."""
        found = []
        for node, one in list(self._nodes.items()):
            penalty = one.now(now)
            one.flapping = penalty >= (UNTIL if one.flapping else FROM)
            if penalty < UNTIL / 4:
                del self._nodes[node]
            member = None if self._world is None else self._world.first_on(node)
            if one.flapping and member is not None:
                found.append(
                    Verdict(
                        fault=Fault.FLAPPING,
                        member=member.member,
                        seat=member.seat,
                        reason=f"node {node} was away {one.times} times in "
                        f"{one.at - one.first:.0f} s: its network or its host is not well",
                        since_s=one.first,
                        evidence={
                            "node": int(node),
                            "times": one.times,
                            "penalty": round(penalty, 2),
                        },
                    )
                )
        return found
