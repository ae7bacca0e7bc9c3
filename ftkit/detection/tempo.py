"""Tempo: how long this job usually stands still between two signs of progress, phase by phase.

A hang is to be named within a second in a job of short steps and must not be seen in one whose
forward takes a minute. So the limit is a multiple of the job's own 99.9th percentile, and each
phase has a history of its own: a checkpoint that takes long says nothing about forward.

Rows are looked at a few times a second, so most gaps are never seen. That does no harm: each
phase occurs once a step, a gap too short to be seen counts as none, and only those that are
long matter for the limit.
"""

import math
from typing import Final

from ftkit.detection.row import Phase

#: Fewer steps are no history: then the job has no tempo yet.
STEPS_MIN: Final = 10
#: Gaps below this are none. Five times it is far below any limit.
GAP_MIN_S: Final = 0.05
#: Of this many gaps one may be longer than the percentile.
ONE_IN: Final = 1000
#: Beyond this many steps the older half counts half: a job changes.
STEPS_MAX: Final = 20_000
#: Bins of gaps are this far apart: the percentile is at most so much too long.
_RATIO: Final = 1.1


class Tempo:
    """Gaps by phase, as counts in bins of equal ratio. Constant memory."""

    def __init__(self) -> None:
        self._steps = 0
        self._bins: dict[Phase, dict[int, int]] = {}

    def advance(self, steps: int) -> None:
        """So many steps were finished."""
        self._steps += steps
        if self._steps > STEPS_MAX:
            self._steps //= 2
            for phase, bins in self._bins.items():
                self._bins[phase] = {b: n // 2 for b, n in bins.items() if n > 1}

    def note(self, phase: Phase, gap_s: float) -> None:
        """The job stood still for at least `gap_s`, waiting for a member in `phase`, and went on."""
        if gap_s < GAP_MIN_S:
            return
        place = math.ceil(math.log(gap_s / GAP_MIN_S, _RATIO))
        bins = self._bins.setdefault(phase, {})
        bins[place] = bins.get(place, 0) + 1

    def usual_s(self, phase: Phase) -> float | None:
        """The 99.9th percentile of the gaps of `phase`; None while there is too little history."""
        if self._steps < STEPS_MIN:
            return None
        bins = self._bins.get(phase, {})
        longer = max(self._steps, sum(bins.values())) // ONE_IN
        for place in sorted(bins, reverse=True):
            longer -= bins[place]
            if longer < 0:
                return GAP_MIN_S * _RATIO**place
        return 0.0
