"""Stretch: for how long those who look were late themselves, and may not accuse. No clock.

Whoever was held up saw nothing in that time, so limits grow by it. A pause of one host is told
by its agent and shows in our own ticks; hosts that pause at the same time do not add up. So what
one observer tells in the time between two reports is summed, and of several observers the latest
counts.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import Final

from ftkit.core.ids import NodeId

#: Each is at least a report long, so they reach back further than any limit.
_KEPT: Final = 512


@dataclass(slots=True)
class _Bucket:
    """What was told within a report of `first`."""

    first: float
    last: float
    by_s: dict[NodeId | None, float] = field(default_factory=dict)


class Stretch:
    """Owned by the detector's thread."""

    def __init__(self, tick_s: float, report_s: float) -> None:
        """Expect a tick about every `tick_s`, and each agent to tell every `report_s`."""
        self._tick_s = tick_s
        self._report_s = report_s
        self._buckets: deque[_Bucket] = deque(maxlen=_KEPT)
        self._told: dict[NodeId | None, float] = {}
        self._ticked_at: float | None = None

    def note(self, who: NodeId | None, by_s: float) -> None:
        """An observer was late by so much since it told last; None: we ourselves."""
        self._told[who] = self._told.get(who, 0.0) + by_s

    def tick(self, now: float) -> None:
        """Take in what was told, and by how much this tick itself is late."""
        gap = 0.0 if self._ticked_at is None else now - self._ticked_at
        self._ticked_at = now
        if gap > 2 * self._tick_s:
            # What we were told of ourselves most likely is this very pause.
            self._told[None] = max(self._told.get(None, 0.0), gap - self._tick_s)
        told = {who: by_s for who, by_s in self._told.items() if by_s > 0}
        self._told = {}
        if not told:
            return
        # By its first moment: were it dragged along with the newest, it would never end.
        if not self._buckets or now - self._buckets[-1].first >= self._report_s:
            self._buckets.append(_Bucket(first=now, last=now))
        bucket = self._buckets[-1]
        bucket.last = now
        for who, by_s in told.items():
            bucket.by_s[who] = bucket.by_s.get(who, 0.0) + by_s

    def since(self, moment: float) -> float:
        """Seconds of lateness told after `moment`: never more than have passed since."""
        if self._ticked_at is None:
            return 0.0
        late_s = sum(max(b.by_s.values()) for b in self._buckets if b.last > moment)
        return min(late_s, max(0.0, self._ticked_at - moment))
