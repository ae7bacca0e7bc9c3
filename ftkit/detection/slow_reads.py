"""SlowReads: ranks that wait longer for their data than the others, in every step. Pure. A label.

A stall is a step that is not like the others (`stalls`). A loader that is always slow, because its
node reads from a slow disk or shares a link, has no other steps: it is told by its peers. A rank's
usual wait is held against that of the faster half of all; where the slow ones are all ranks of some
nodes, those are named. Where everybody waits alike nobody is slow: that is the data set.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median_low
from typing import Final

from ftkit.core.ids import MemberId, NodeId, Seat
from ftkit.core.verdict import Fault, Verdict
from ftkit.core.world import World
from ftkit.detection.aligned import StepOf
from ftkit.detection.cusum import median

#: Steps that make what is usual.
STEPS: Final = 16
#: So many times what others wait, and so much of a step more, is slow,
TIMES: Final = 3.0
SHARE: Final = 0.2
#: and at least so much more: below, it may be the scheduler.
LEAST_S: Final = 0.02
#: It is over when it waits less than this share of that longer.
_HOLDS: Final = 0.5


@dataclass(frozen=True, slots=True)
class _Slow:
    seat: Seat
    since: float
    seconds: float
    others_s: float


class SlowReads:
    """Watches the loader of every member. Owned by one thread."""

    def __init__(self) -> None:
        self._waits: dict[MemberId, deque[float]] = {}
        self._slow: dict[MemberId, _Slow] = {}
        self._nodes: Mapping[MemberId, NodeId] = {}

    def step(self, step: StepOf, *, step_s: float, at: float) -> None:
        """Take in one step, which usually takes `step_s` and ended at `at`."""
        for member, one in step.items():
            waits = self._waits.setdefault(member, deque(maxlen=STEPS))
            waits.append(one.seconds.get("data", 0.0))
        usual = {m: median(self._waits[m]) for m in step if len(self._waits[m]) == STEPS}
        if len(usual) < 2:
            return
        others_s = median_low(usual.values())
        more = max((TIMES - 1) * others_s, SHARE * step_s, LEAST_S)
        for member, waited_s in usual.items():
            known = self._slow.get(member)
            if waited_s - others_s < more * (1.0 if known is None else _HOLDS):
                self._slow.pop(member, None)
            else:
                since = at - STEPS * step_s if known is None else known.since
                self._slow[member] = _Slow(step[member].seat, since, waited_s, others_s)

    def tick(self) -> list[Verdict]:
        """One label for each rank that is slow, with what it shares with the others that are."""
        nodes = {self._nodes[m] for m in self._slow if m in self._nodes}
        whole = {m for m, node in self._nodes.items() if node in nodes} == set(self._slow)
        where = f": all ranks of nodes {sorted(nodes)}" if whole and nodes else ""
        return [
            Verdict(
                fault=Fault.DATA_STALL,
                member=member,
                seat=one.seat,
                reason=(
                    f"seat {one.seat} (member {member}) waits {one.seconds:.2f} s for its loader in "
                    f"every step, the others {one.others_s:.2f} s{where}"
                ),
                since_s=one.since,
                evidence={
                    "where": "reads",
                    "seconds": round(one.seconds, 4),
                    "others_s": round(one.others_s, 4),
                    "seats": sorted(int(s.seat) for s in self._slow.values())[:64],
                    "nodes": sorted(int(n) for n in nodes) if whole else [],
                },
                confidence=0.9,
            )
            for member, one in self._slow.items()
        ]

    def change(self, world: World) -> None:
        """Another world: its members count, with what is known of them."""
        self._nodes = {m.member: m.node for m in world.members}
        self._waits = {m: waits for m, waits in self._waits.items() if m in self._nodes}
        self._slow = {m: one for m, one in self._slow.items() if m in self._nodes}
