"""SlowIo: a node whose storage takes much longer than it did, or than other nodes'. Pure.

Each agent tells once a second what it did to a store, by kind (write, sync, put, read), and for how
long. What was done is counted in units, one for each operation and one for each MiB, so that neither
small files nor large ones look slow by themselves. The usual time of a unit is the median of the
node's own last windows, or of the other nodes', whichever is less. What is beyond `FACTOR` times that adds up, as in a CUSUM, and is slow from
`ALARM_S` on: a sum of seconds that were really lost, so that milliseconds never count, and a write
that does not return is said while it hangs. Nobody is removed for it: it is a label with a place.
"""

from collections import deque
from dataclasses import dataclass, field
from statistics import median
from typing import ClassVar

from ftkit.core.ids import NodeId
from ftkit.core.verdict import Fault, Verdict
from ftkit.core.world import Member, World
from ftkit.detection.observations import Observation, WorldChanged
from ftkit.detection.signals import IoSeen, NodeSeen

#: Bytes that count like an operation.
UNIT_BYTES = 1 << 20
#: So many times the usual is slow.
FACTOR = 3.0
#: Seconds beyond that, added up.
ALARM_S = 2.0
#: Windows that make a history, and that are kept of it.
WINDOWS_MIN, WINDOWS = 3, 32
#: Other nodes with a history that make a comparison.
PEERS_MIN = 2
#: Windows at the usual pace, one after another, that end it.
USUAL_AGAIN = 2
#: A store that nobody has used for so long is no longer known to be slow.
HOLD_S = 60.0


@dataclass(slots=True)
class _Series:
    """One node's operations of one kind on one store."""

    history: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOWS))
    """Seconds of one unit, by window; those that were slow are not in it."""
    excess_s: float = 0.0
    since: float = 0.0
    """When what is in the excess began."""
    spent_s: float = 0.0
    count: int = 0
    """Of what is in the excess."""
    usual_s: float = 0.0
    """What that would have taken."""
    good: int = 0
    """Windows at the usual pace since."""
    at: float = float("-inf")

    @property
    def slow(self) -> bool:
        return self.excess_s >= ALARM_S


class SlowIo:
    """One detector of the panel. Owned by one thread."""

    HEARS: ClassVar[frozenset[type]] = frozenset({IoSeen, NodeSeen, WorldChanged})

    def __init__(self) -> None:
        self._world: World | None = None
        self._series: dict[tuple[str, str, NodeId], _Series] = {}
        """By path, kind of operation, node."""
        self._pressure: dict[NodeId, float] = {}

    def ingest(self, observation: Observation) -> None:
        """Take in what agents did to stores, and how busy their disks are."""
        match observation:
            case WorldChanged(world=world):
                self._world = world
            case NodeSeen(node=node, pressure=pressure) if "io" in pressure:
                self._pressure[node] = float(pressure["io"])
            case IoSeen():
                self._take(observation)
            case _:
                pass

    def tick(self, now: float) -> list[Verdict]:
        """One verdict for each node and store that is slow, by its worst operation."""
        if self._world is None:
            return []
        worst: dict[tuple[str, NodeId], tuple[str, _Series]] = {}
        for (path, op, node), one in self._series.items():
            if not one.slow or now - one.at > HOLD_S:
                continue
            known = worst.get((path, node))
            if known is None or one.excess_s > known[1].excess_s:
                worst[path, node] = op, one
        found = []
        for (path, node), (op, one) in sorted(worst.items()):
            member = self._world.first_on(node)
            if member is None:
                continue
            others = sorted(n for p, n in worst if p == path and n != node)
            found.append(self._verdict(path, op, one, others, member))
        return found

    def _take(self, seen: IoSeen) -> None:
        one = self._series.setdefault((seen.path, seen.op, seen.node), _Series())
        one.at = seen.at
        usual = self._usual(seen, one)
        units = seen.count + seen.nbytes / UNIT_BYTES
        if usual is None:
            if seen.count:
                one.history.append(seen.seconds / units)
            return
        allowed = FACTOR * usual * units
        slow = seen.seconds > allowed
        if slow and not one.excess_s:
            one.since, one.spent_s, one.usual_s, one.count = seen.at - seen.seconds, 0.0, 0.0, 0
        one.excess_s = max(0.0, one.excess_s + seen.seconds - allowed)
        if one.excess_s:
            one.spent_s += seen.seconds
            one.usual_s += usual * units
            one.count += seen.count
        if slow:
            one.good = 0
        elif seen.count:
            one.history.append(seen.seconds / units)
            one.good += 1
            if one.good >= USUAL_AGAIN:
                one.excess_s = 0.0

    def _usual(self, seen: IoSeen, one: _Series) -> float | None:
        """Seconds that a unit takes; None while nobody can say."""
        peers = [
            median(s.history)
            for (path, op, node), s in self._series.items()
            if (path, op) == (seen.path, seen.op)
            and node != seen.node
            and len(s.history) >= WINDOWS_MIN
        ]
        known = [median(peers)] if len(peers) >= PEERS_MIN else []
        if len(one.history) >= WINDOWS_MIN:
            known.append(median(one.history))
        return min(known, default=None)

    def _verdict(
        self,
        path: str,
        op: str,
        one: _Series,
        others: list[NodeId],
        member: Member,
    ) -> Verdict:
        node = member.node
        where = (
            f"nodes {others} are slow there, too: it is the storage"
            if others
            else "on the other nodes it is as it was"
        )
        return Verdict(
            fault=Fault.SLOW_IO,
            member=member.member,
            seat=member.seat,
            reason=f"node {node} has waited {one.spent_s:.1f} s for {one.count} times {op} in {path}, "
            f"which usually takes {one.usual_s:.2g} s; {where}",
            since_s=one.since,
            evidence={
                "node": int(node),
                "path": path,
                "op": op,
                "count": one.count,
                "spent_s": round(one.spent_s, 3),
                "usual_s": round(one.usual_s, 4),
                "others": [int(n) for n in others],
                "pressure_io": self._pressure.get(node),
            },
            confidence=0.9,
        )
