"""SlowTransfers: a group whose collectives take longer than they did though all had come. Pure.

What a collective takes once all are there (`lateness`) is compared with what those of the same
group and size took before, so it makes no difference what a step is, whether there are steps at
all, and which parts of a job a group joins: data parallel, FSDP2, tensor parallel, or an unchanged
script's over gloo. It is slow when several in a row, over some seconds, took more than twice as
long. That names no path: `inquiry` has the paths tested, and only where none is bad, or none can
be tested, does it stay at that.

Where the cores of a node are fought for transfers take longer, too. Then nothing can be told from
them, and that is said instead (`blind`).
"""

from collections import deque
from dataclasses import dataclass, field
from typing import Final

from ftkit.core.ids import NodeId, Seat
from ftkit.core.verdict import Fault, Verdict
from ftkit.core.world import Member, World
from ftkit.detection.cusum import median
from ftkit.detection.lateness import Joined
from ftkit.detection.observations import Observation, WorldChanged
from ftkit.detection.paths import FLOOR_S
from ftkit.detection.signals import NodeSeen

#: So many times the usual, and by more than the scheduler's noise, is slow.
TIMES: Final = 2.0
#: Slow collectives of a group in a row, and for how long, that make a verdict.
IN_A_ROW: Final = 4
LASTS_S: Final = 5.0
#: Collectives of one size that are kept, and that make what is usual.
KEPT: Final = 32
HISTORY_MIN: Final = 8
#: The first of a size, which warm connections up.
EXCLUDED: Final = 2
#: Sizes that are kept of a group: of a script that never sends the same size twice nothing is usual.
SIZES_MAX: Final = 64
#: Nothing more was heard of a group for so long: it may have been slow last, but is no longer.
HOLD_S: Final = 10.0
#: From this share of the last ten seconds on in which some process waited for a core, a transfer
#: says nothing of a network.
BUSY: Final = 0.25


@dataclass(slots=True)
class _Group:
    """One group's transfers in this world."""

    usual: dict[int, deque[float]] = field(default_factory=dict)
    """Bytes -> what transfers of that size took, those that were slow left out."""
    seen: dict[int, int] = field(default_factory=dict)
    slow: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=KEPT))
    """Those that were slow in a row: seconds, and what was usual."""
    since: float = 0.0
    """When the row began."""
    at: float = float("-inf")
    seats: frozenset[Seat] = frozenset()


class SlowTransfers:
    """Owned by one thread."""

    def __init__(self) -> None:
        self._world: World | None = None
        self._groups: dict[int, _Group] = {}
        self._pressure: dict[NodeId, float] = {}
        self.blind: frozenset[NodeId] = frozenset()
        """Nodes that are too busy for anything to be told from transfers that look slow."""

    def ingest(self, observation: Observation) -> None:
        """Take in the world and how busy nodes are."""
        match observation:
            case WorldChanged(world=world):
                self._world = world
                self._groups.clear()
            case NodeSeen(node=node, pressure=pressure):
                self._pressure[node] = float(pressure.get("cpu", 0.0))
            case _:
                pass

    def take(self, joined: Joined, *, at: float) -> None:
        """Take in one collective, which was over at `at` or a moment before."""
        if self._world is None or joined.generation != self._world.generation:
            return
        group = self._groups.setdefault(joined.group, _Group())
        group.at, group.seats = at, frozenset(joined.late_s)
        nbytes = joined.nbytes
        group.seen[nbytes] = group.seen.get(nbytes, 0) + 1
        if group.seen[nbytes] <= EXCLUDED:
            if len(group.seen) > SIZES_MAX:
                for kept in (group.seen, group.usual):
                    kept.clear()
            return
        history = group.usual.setdefault(nbytes, deque(maxlen=KEPT))
        usual = median(history) if len(history) >= HISTORY_MIN else None
        if usual is not None and joined.transfer_s > max(TIMES * usual, usual + FLOOR_S):
            if not group.slow:
                group.since = at
            group.slow.append((joined.transfer_s, usual))
        else:
            history.append(joined.transfer_s)
            group.slow.clear()

    def tick(self, now: float) -> list[Verdict]:
        """One verdict for each group that is slow, unless its nodes are busy."""
        found, blind = list[Verdict](), set[NodeId]()
        here = {m.seat: m for m in self._world.members} if self._world is not None else {}
        for number, group in sorted(self._groups.items()):
            lasts_s = group.at - group.since
            if len(group.slow) < IN_A_ROW or lasts_s < LASTS_S or now - group.at > HOLD_S:
                continue
            members = [here[seat] for seat in sorted(group.seats) if seat in here]
            busy = {m.node for m in members if self._pressure.get(m.node, 0.0) >= BUSY}
            blind |= busy
            if members and not busy:
                found.append(self._verdict(number, group, members))
        self.blind = frozenset(blind)
        return found

    def _verdict(self, number: int, group: _Group, members: list[Member]) -> Verdict:
        took = median([seconds for seconds, _ in group.slow])
        times = median([seconds / max(usual, 1e-9) for seconds, usual in group.slow])
        seats = [int(m.seat) for m in members]
        nodes = sorted({int(m.node) for m in members})
        return Verdict(
            fault=Fault.SLOW_COMM,
            member=members[0].member,
            seat=members[0].seat,
            reason=(
                f"collectives of group {number} (seats {_first(seats)}) take {1e3 * took:.0f} ms "
                f"once all are there, {times:.1f} times as long as they did"
            ),
            since_s=group.since,
            evidence={
                "group": number,
                "seats": seats[:64],
                "nodes": nodes[:64],
                "transfer_s": round(took, 6),
                "times": round(times, 2),
                "collectives": len(group.slow),
            },
            # Of what is between them nothing is known but that it is slow.
            confidence=0.6,
        )


def _first(seats: list[int]) -> str:
    return ", ".join(map(str, seats[:8])) + (", ..." if len(seats) > 8 else "")
