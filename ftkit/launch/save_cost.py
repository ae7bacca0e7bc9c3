"""SaveCost: what a checkpoint costs training, by how much slower steps are while one is written.

A rank waits for no write; but writing takes cores, memory and the network, and what training loses
by that is nowhere but in the pace of its steps. So the pace while nothing is written is set beside that
while something is. Told the time, and the step that is played, at the moments when it moved on.
"""

import statistics
from collections import deque

from ftkit.core.ids import Generation, Step

#: The last saves count, those before do not: the job, or the machine's other work, may have changed.
SAVES_KEPT = 5
#: Stretches without a write that make the pace.
QUIET_KEPT = 64
#: Steps without a write that must have been seen before a save is measured against them.
QUIET_STEPS_MIN = 5
#: What reads as less than this share of the time of the write is not believed: the looks are too far
#: apart to see it.
RESOLUTION = 0.01


class SaveCost:
    """Owned by one thread. Seconds of any one clock."""

    def __init__(self) -> None:
        self._held: deque[float] = deque(maxlen=SAVES_KEPT)
        self._wrote: deque[float] = deque(maxlen=SAVES_KEPT)
        self._quiet: deque[tuple[float, int]] = deque(maxlen=QUIET_KEPT)
        self._generation: Generation | None = None
        self._at: tuple[float, Step] | None = None
        """When the step moved on last, and to which."""
        self._touched = False
        """Whether something was written since."""
        self._began: float | None = None
        """Of the write under way, or that has ended since the step moved on."""
        self._ended: float | None = None
        self._busy = 0.0, 0
        """Seconds and steps beside this write."""
        self._whole = True
        """Whether all of it was beside one world that trained."""

    @property
    def held_s(self) -> float | None:
        """Training time that a save costs, the median of the last ones; None before the first."""
        return statistics.median(self._held) if self._held else None

    @property
    def wrote_s(self) -> float | None:
        """From the order for a save until it is on disk, likewise."""
        return statistics.median(self._wrote) if self._wrote else None

    def look(
        self,
        generation: Generation | None,
        step: Step | None,
        *,
        writing: bool,
        saved: bool = True,
        now: float,
    ) -> float | None:
        """Take in one look; returns what a save that is over by it has cost, if it can be told.

        Args:
          generation: of the world that trains; None while nobody does.
          step: the one that its members play; None when not all of them do.
          writing: whether a checkpoint is on its way to disk.
          saved: whether the newest that was, is there: what was given up says nothing.
          now: the time.
        """
        if writing and self._began is None:
            self._began, self._ended, self._busy = now, None, (0.0, 0)
            self._whole = generation is not None
        elif not writing and self._began is not None and self._ended is None:
            self._ended, self._whole = now, self._whole and saved
        elif writing and self._ended is not None:
            # Another has begun before the step moved on: which cost what cannot be told.
            self._ended, self._whole = None, False
        if generation is None or generation != self._generation:
            self._forget(generation)
        self._touched = self._touched or self._began is not None
        if step is None or generation is None:
            return None
        if self._at is None:
            self._at, self._touched = (now, step), self._began is not None
            return None
        since, before = self._at
        if step <= before:
            return None
        stretch = now - since, step - before
        self._at = now, step
        if not self._touched:
            self._quiet.append(stretch)
            return None
        self._busy = self._busy[0] + stretch[0], self._busy[1] + stretch[1]
        self._touched = self._began is not None and self._ended is None
        return self._over() if self._ended is not None else None

    def _forget(self, generation: Generation | None) -> None:
        """Another world trains, or none: its pace is another."""
        self._generation, self._at = generation, None
        self._quiet.clear()
        self._whole = False
        if self._ended is not None:
            self._began = self._ended = None

    def _over(self) -> float | None:
        assert self._began is not None, "it has ended"
        assert self._ended is not None, "it has ended"
        wrote_s = self._ended - self._began
        self._began = self._ended = None
        quiet_s, quiet = (sum(s for s, _ in self._quiet), sum(n for _, n in self._quiet))
        if not self._whole or quiet < QUIET_STEPS_MIN:
            return None
        seconds, steps = self._busy
        held = max(seconds - steps * quiet_s / quiet, RESOLUTION * wrote_s)
        self._held.append(held)
        self._wrote.append(wrote_s)
        return held
