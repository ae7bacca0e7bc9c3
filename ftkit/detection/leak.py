"""Leaks: a member whose memory grows and will run out, and when. Pure.

The slope of its resident memory is that of Theil and Sen (the median over all pairs of samples,
so that steps and spikes do not count), with the confidence interval of Sen (1968). It is a leak
when even the lower end of that interval uses up what the node has left within `HORIZON_S`, is not
far from the middle (what breathes has a wide interval, and is looked at every second), and was
watched for long enough: a tenth of the time that is left, two minutes at most.
"""

import math
import statistics
from collections import deque
from dataclasses import dataclass, field
from typing import ClassVar

from ftkit.core.ids import MemberId, NodeId
from ftkit.core.verdict import Fault, Verdict
from ftkit.core.world import World
from ftkit.detection.observations import Observation, RowSeen, WorldChanged
from ftkit.detection.signals import NodeSeen

HORIZON_S = 7200.0
#: Samples kept of a member; when there are more, every second one goes.
SAMPLES = 48
SAMPLES_MIN = 8
SPACING_S = 1.0
WATCHED_MAX_S = 120.0
#: What a member may grow by for whatever reason.
GROWTH_MIN = 64 << 20
#: Steps in which memory grows because everything is made for the first time.
STEPS_EXCLUDED = 3


@dataclass(frozen=True, slots=True)
class Slope:
    """Of a line through samples, with its 95 % interval."""

    middle: float
    low: float
    high: float


@dataclass(slots=True)
class _Member:
    seat_seen: RowSeen
    spacing_s: float = SPACING_S
    samples: deque[tuple[float, float]] = field(default_factory=deque)
    """(time, bytes)."""


class Leaks:
    """One detector of the panel. Owned by one thread."""

    HEARS: ClassVar[frozenset[type]] = frozenset({NodeSeen, RowSeen, WorldChanged})

    def __init__(self) -> None:
        self._world: World | None = None
        self._members: dict[MemberId, _Member] = {}
        self._left: dict[NodeId, int] = {}

    def ingest(self, observation: Observation) -> None:
        """Take in rows with what /proc says, and what nodes have left."""
        match observation:
            case WorldChanged(world=world):
                self._world = world
                self._members = {
                    m: one for m, one in self._members.items() if m in world.member_ids
                }
            case NodeSeen(node=node, available_bytes=left):
                self._left[node] = left
            case RowSeen(facts=facts, row=row) if facts is not None and row.step > STEPS_EXCLUDED:
                self._sample(observation, facts.rss_bytes)
            case _:
                pass

    def tick(self, now: float) -> list[Verdict]:
        """Members that will run out of memory."""
        if self._world is None:
            return []
        nodes = {m.member: m.node for m in self._world.members}
        found = []
        for member, one in self._members.items():
            node = nodes.get(member)
            left = None if node is None else self._left.get(node)
            if left is not None and (verdict := _judge(one, left)) is not None:
                found.append(verdict)
        return found

    def _sample(self, seen: RowSeen, nbytes: int) -> None:
        one = self._members.get(seen.member)
        if one is None:
            one = self._members[seen.member] = _Member(seen)
        if one.samples and seen.at - one.samples[-1][0] < one.spacing_s:
            return
        one.seat_seen = seen
        one.samples.append((seen.at, float(nbytes)))
        if len(one.samples) > SAMPLES:
            one.samples = deque(list(one.samples)[::2])
            one.spacing_s *= 2


def _judge(one: _Member, left: int) -> Verdict | None:
    if len(one.samples) < SAMPLES_MIN:
        return None
    (first_at, first), (last_at, last) = one.samples[0], one.samples[-1]
    watched_s = last_at - first_at
    # Cheap, and true of nearly all: only what may be a leak is worth all its pairs.
    if last - first < GROWTH_MIN or left > (last - first) / watched_s * 2 * HORIZON_S:
        return None
    slope = theil_sen(list(one.samples))
    if slope.low < slope.middle / 2 or slope.low <= 0:
        return None
    soonest_s, likely_s, latest_s = (left / s for s in (slope.high, slope.middle, slope.low))
    if latest_s > HORIZON_S or watched_s < min(WATCHED_MAX_S, likely_s / 10):
        return None
    seen = one.seat_seen
    return Verdict(
        fault=Fault.LEAK,
        member=seen.member,
        seat=seen.seat,
        reason=f"its memory grows by {slope.middle * 60 / 2**20:.0f} MiB a minute, and the node has "
        f"{left / 2**30:.1f} GiB left: out of memory in {likely_s / 60:.1f} minutes "
        f"({soonest_s / 60:.1f} to {latest_s / 60:.1f})",
        since_s=first_at,
        evidence={
            "bytes_per_s": round(slope.middle),
            "left_bytes": left,
            "oom_s": [round(soonest_s, 1), round(likely_s, 1), round(latest_s, 1)],
            "rss_bytes": round(last),
        },
        confidence=0.95,
    )


def theil_sen(samples: list[tuple[float, float]]) -> Slope:
    """The median slope over all pairs, and Sen's 95 % interval of it.

    Args:
      samples: (x, y), at least two, with x that rise.
    """
    slopes = sorted(
        (y2 - y1) / (x2 - x1) for i, (x1, y1) in enumerate(samples) for x2, y2 in samples[i + 1 :]
    )
    n, count = len(samples), len(slopes)
    half = 1.96 * math.sqrt(n * (n - 1) * (2 * n + 5) / 18)
    low = max(0, math.floor((count - half) / 2))
    high = min(count - 1, math.ceil((count + half) / 2))
    return Slope(statistics.median(slopes), slopes[low], slopes[high])
