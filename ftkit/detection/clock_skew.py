"""ClockSkew: nodes whose wall clock is off. Pure. No other verdict rests on wall clocks.

The offset is that of four time stamps, as in NTP; of the last few exchanges the one that was
shortest on its way counts, for it is the most exact.
"""

from collections import deque
from typing import ClassVar

from ftkit.core.ids import NodeId
from ftkit.core.verdict import Fault, Verdict
from ftkit.core.world import World
from ftkit.detection.observations import Observation, WorldChanged
from ftkit.detection.signals import ClockSeen

#: A clock may be off by so much.
OFFSET_MAX_S = 0.05
#: Of so many exchanges the shortest counts.
EXCHANGES, EXCHANGES_MIN = 5, 2


class ClockSkew:
    """One detector of the panel. Owned by one thread."""

    HEARS: ClassVar[frozenset[type]] = frozenset({ClockSeen, WorldChanged})

    def __init__(self) -> None:
        self._world: World | None = None
        self._seen: dict[NodeId, deque[ClockSeen]] = {}

    def ingest(self, observation: Observation) -> None:
        """Take in exchanges of time stamps."""
        match observation:
            case WorldChanged(world=world):
                self._world = world
            case ClockSeen(node=node):
                self._seen.setdefault(node, deque(maxlen=EXCHANGES)).append(observation)
            case _:
                pass

    def tick(self, now: float) -> list[Verdict]:
        """One verdict for each node whose clock is off by more than an exchange can be."""
        if self._world is None:
            return []
        found = []
        for node, seen in self._seen.items():
            member = self._world.first_on(node)
            best = min(seen, key=lambda s: s.error_s)
            if member is None or len(seen) < EXCHANGES_MIN:
                continue
            if abs(best.offset_s) - best.error_s <= OFFSET_MAX_S:
                continue
            where = "ahead of" if best.offset_s > 0 else "behind"
            found.append(
                Verdict(
                    fault=Fault.CLOCK,
                    member=member.member,
                    seat=member.seat,
                    reason=f"the wall clock of node {node} is {abs(best.offset_s) * 1e3:.0f} ms {where} "
                    f"the coordinator's (within {best.error_s * 1e3:.0f} ms): look after its NTP. "
                    "Nothing in ftkit rests on it, but logs do",
                    since_s=best.at,
                    evidence={
                        "node": int(node),
                        "offset_s": round(best.offset_s, 6),
                        "error_s": round(best.error_s, 6),
                    },
                )
            )
        return found


def offset_of(sent: float, received: float, answered: float, back: float) -> tuple[float, float]:
    """(how far the other clock is ahead, by how much that may be wrong), in seconds.

    Args:
      sent: here, when it was sent.
      received: there, when it came.
      answered: there, when the answer was sent.
      back: here, when that came.
    """
    offset = ((received - sent) + (answered - back)) / 2
    return offset, max(0.0, (back - sent) - (answered - received)) / 2
