"""IdleWindows: how long training leaves the network alone, learnt from when it did not. Pure.

Training's transfers come in a pattern that repeats each step: short gaps between buckets, and a
long one while forward and half of backward run. Gemini (SOSP'23) profiles them beforehand; here
the last ones are remembered, so that a change of the model or the batch is learnt as it comes.
"""

import bisect
from collections import deque
from collections.abc import Iterable

#: Windows that are remembered: some steps of some buckets each.
KEEP = 64

#: Of the windows that this one may turn out to be, so large a part is at least as long as we say.
SURE = 0.75

#: A window that lasts so many times as long as any before it is no part of the pattern: training
#: waits for something else, or has ended.
FREE = 2.0


class IdleWindows:
    """Fed with the begin and end of transfers, in order of time. One thread's object."""

    def __init__(self, keep: int = KEEP) -> None:
        """Know nothing: until a first transfer ends, all time is idle."""
        self._windows: deque[tuple[float, float]] = deque(maxlen=keep)
        self._transfers: deque[float] = deque(maxlen=keep)
        """How long the ones between the windows were, in seconds."""
        self._busy = 0
        self._since: float | None = None
        self._began: float | None = None
        """Since when transfers are under way, as far as is known."""

    @property
    def busy(self) -> bool:
        """Whether a transfer of training's is under way."""
        return self._busy > 0

    @property
    def lengths(self) -> list[float]:
        """The windows that are remembered, oldest first, in seconds."""
        return [end - start for start, end in self._windows]

    def begin(self, now: float) -> None:
        """A transfer began. Several may be under way at once."""
        if not self._busy and self._since is not None and now > self._since:
            self._windows.append((self._since, now))
        if not self._busy:
            self._began = now
        self._busy += 1

    def end(self, now: float) -> None:
        """A transfer ended. One that was never seen to begin ends nothing."""
        if self._busy == 1 and self._began is not None:
            self._transfers.append(now - self._began)
        self._busy = max(0, self._busy - 1)
        if not self._busy:
            self._since = now

    def look(self, *, busy: bool, since: float) -> None:
        """How it is now, seen by somebody who does not see every transfer.

        Args:
          busy: whether one is under way.
          since: when that began; when the last one ended, where none is.
        """
        if busy and not self._busy:
            self._began = since
        self._busy = int(busy)
        if not busy:
            self._since = since

    def relearn(
        self, transfers: Iterable[tuple[float, float | None]], *, keep_after: float
    ) -> None:
        """Forget all; learn from transfers, (begin, end or None) each, in any order.

        Args:
          transfers: of all ranks that share the network.
          keep_after: windows that began earlier are left out: records of some ranks reach
            further back than those of others, and what looks idle may only be forgotten.
        """
        self._windows.clear()
        self._transfers.clear()
        self._busy, self._since = 0, None
        for begin, end in merged(transfers):
            if self._since is not None and self._since >= keep_after:
                self._windows.append((self._since, begin))
            if end is None:
                self._busy, self._began = 1, begin
            else:
                self._since = end
                self._transfers.append(end - begin)

    def left(self, now: float) -> float:
        """Seconds that the window we are in will last yet; 0 when there is none.

        Of the windows remembered, this one can be any that was not over by now; three in four of
        them were at least as long as the answer says.
        """
        if self.busy:
            return 0.0
        if self._since is None or not self._windows:
            return float("inf")
        lasted = now - self._since
        lengths = sorted(self.lengths)
        longer = lengths[bisect.bisect_right(lengths, lasted) :]
        if not longer:
            return float("inf") if lasted > FREE * lengths[-1] else 0.0
        return longer[int((1 - SURE) * len(longer))] - lasted

    def busy_for(self, now: float) -> float:
        """Seconds that transfers will go on at least, if they are like one remembered; 0: unknown."""
        if not self._busy or self._began is None:
            return 0.0
        lasted = now - self._began
        return min((t - lasted for t in self._transfers if t > lasted), default=0.0)

    def had(self, seconds: float) -> bool:
        """Whether one of the windows remembered was so long."""
        return any(length >= seconds for length in self.lengths)

    def idle_share(self, least_s: float = 0.0) -> float:
        """The part of the remembered time that windows of at least `least_s` make up; 1: all."""
        if not self._windows:
            return 1.0
        span = self._windows[-1][1] - self._windows[0][0]
        return sum(length for length in self.lengths if length >= least_s) / span


def merged(
    transfers: Iterable[tuple[float, float | None]],
) -> list[tuple[float, float | None]]:
    """Times at which at least one was under way, in order; the last may have no end yet."""
    found = list[tuple[float, float | None]]()
    for begin, end in sorted(transfers, key=lambda t: t[0]):
        if found and (found[-1][1] is None or begin <= found[-1][1]):
            last = found[-1][1]
            found[-1] = found[-1][0], None if last is None or end is None else max(last, end)
        else:
            found.append((begin, end))
    return found
