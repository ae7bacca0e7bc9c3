"""Sums: one Cusum for each member over one kind of residual, under a threshold of their own.

The threshold is calibrated on what members that are no suspects have shown so far: often at first,
then now and then.
"""

import math
from collections import deque
from typing import Final

from ftkit.core.ids import MemberId
from ftkit.detection.cusum import Cusum, Threshold, calibrate, median, spread

#: Residuals kept of each member.
_KEPT: Final = 64

#: Residuals that a calibration looks at, at most: they are spread over members.
_SAMPLES: Final = 4096

#: Fewer residuals say nothing.
_SAMPLES_MIN: Final = 6


class Sums:
    """Owned by one detector."""

    def __init__(self, *, effect: float) -> None:
        self._effect = effect
        self._cusums: dict[MemberId, Cusum] = {}
        self._recent: dict[MemberId, deque[tuple[float, float]]] = {}
        self._pushed = 0
        self._next = 0
        self.threshold: Threshold | None = None
        """None until there are residuals to calibrate it on."""

    def push(
        self, residuals: dict[MemberId, float], *, at: float, steps_between: float
    ) -> set[MemberId]:
        """Add one step's residuals. Returns the members whose sum is over the threshold.

        `steps_between` are the rank-steps for each false alarm that is allowed.
        """
        over: set[MemberId] = set()
        for member, residual in residuals.items():
            self._recent.setdefault(member, deque(maxlen=_KEPT)).append((residual, at))
            if self.threshold is None:
                continue
            cusum = self._cusums.setdefault(member, Cusum())
            if cusum.push(residual, self.threshold, at=at):
                over.add(member)
        self._pushed += bool(residuals)
        self._settle(steps_between)
        # Under the threshold as it is now: what has come in since may have raised it.
        return {m for m in over if self.share(m) >= 1 - 1e-9}

    def _settle(self, steps_between: float) -> None:
        """Calibrate, when enough has come in since the last time."""
        if self._pushed < self._next:
            return
        self._next = self._pushed + min(64, max(1, self._pushed // 2))
        pool = self._pool()
        if sum(len(series) for series in pool) < _SAMPLES_MIN:
            return
        first = self.threshold is None
        threshold = calibrate(pool, effect=self._effect, steps_between=steps_between)
        if math.isinf(threshold.h):
            return  # so far the innocent drift upwards: nothing can be told from that
        self.threshold = threshold
        if first:
            # What was seen before there was a threshold counts as well.
            for member, series in self._recent.items():
                cusum = self._cusums[member] = Cusum()
                for residual, at in series:
                    cusum.push(residual, threshold, at=at)

    def share(self, member: MemberId) -> float:
        """How much of the evidence that it takes there is; 0 for a member without any."""
        cusum = self._cusums.get(member)
        return 0.0 if cusum is None or self.threshold is None else cusum.sum / self.threshold.h

    def level(self, member: MemberId, steps: int) -> float | None:
        """The mean of its last residuals, 64 at most; None when it has none."""
        series = self._recent.get(member)
        if not series:
            return None
        last = [residual for residual, _ in list(series)[-steps:]]
        return sum(last) / len(last)

    def usual(self, member: MemberId, steps: int) -> float:
        """The median of its last residuals; 0 when it has none."""
        series = [residual for residual, _ in self._recent.get(member, ())]
        return median(series[-steps:]) if series else 0.0

    def noise(self, member: MemberId, steps: int) -> float:
        """The spread of its last residuals about their own median."""
        return spread([residual for residual, _ in self._recent.get(member, ())][-steps:])

    def cusum(self, member: MemberId) -> Cusum:
        """The sum of a member that has pushed."""
        return self._cusums[member]

    def forget(self, keep: frozenset[MemberId]) -> None:
        """Drop all but these members."""
        for member in set(self._recent) - keep:
            del self._recent[member]
            self._cusums.pop(member, None)

    def _pool(self) -> list[list[float]]:
        """Residuals of members that are no suspects, of at most `_SAMPLES` in all."""
        everybody = sorted(self._recent)
        total = sum(len(self._recent[m]) for m in everybody)
        stride = max(1, -(-total // _SAMPLES))
        chosen = {m: [e for e, _ in self._recent[m]] for m in everybody[::stride]}
        values = [e for series in chosen.values() for e in series]
        sigma = spread(values)
        effect = math.log1p(self._effect)
        return [
            series
            for series in chosen.values()
            # By its own noise the median of an innocent one does not come that far.
            if median(series) <= max(0.5 * effect, 4 * sigma / math.sqrt(len(series)))
        ]
