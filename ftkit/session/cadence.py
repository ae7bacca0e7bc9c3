"""Cadence: how often something is looked at that takes time, so that it takes no more than a share.

Every k-th step, with k a power of two. Each rank measures for itself; as all take powers of two,
they meet at the larger one's steps.
"""

import time

#: Share of the training time that looking may take.
BUDGET = 0.005

#: Looking less often than this would find nothing worth mending.
EVERY_MAX = 1024

#: What a step's time is smoothed with: the newest counts this much.
_NEWEST = 0.2


class Cadence:
    """Owned by the training thread."""

    def __init__(self, every: int | None) -> None:
        """Look every so many steps; 0 for never, None for as often as `BUDGET` allows."""
        self._every = every
        self._over = every == 0
        self._cost_s: float | None = None
        self._step_s: float | None = None
        self._committed_at: float | None = None

    @property
    def every(self) -> int:
        """Steps between two looks, as far as is known; 0 for never."""
        if self._over:
            return 0
        if self._every is not None:
            return self._every
        if self._cost_s is None or self._step_s is None:
            return 1  # the first look tells what looks cost
        every = 1
        while every < EVERY_MAX and self._cost_s > BUDGET * self._step_s * every:
            every *= 2
        return every

    def due(self, step: int) -> bool:
        """Whether `step` is one to look at."""
        return bool(self.every) and step % self.every == 0

    def took(self, seconds: float) -> None:
        """A look took so long."""
        self._cost_s = seconds

    def committed(self) -> None:
        """A step was committed: learn how long steps take."""
        now = time.monotonic()
        if self._committed_at is not None:
            took_s = now - self._committed_at
            before = took_s if self._step_s is None else self._step_s
            self._step_s = before + _NEWEST * (took_s - before)
        self._committed_at = now

    def end(self) -> None:
        """Look no more."""
        self._over = True
