"""ClockOffset: how far another host's monotonic clock is from ours, told by its messages. Pure.

A message says when it was sent, on the sender's clock, and comes some time later, on ours. Of
many, the one that was shortest on its way tells the difference best; what is left in it is that
shortest way. It has to stand still: times that are shifted by another amount with each message
look like progress where there is none. It is renewed from time to time, for clocks drift.
"""

from typing import Final

#: The shortest of so long counts, and of as long before it.
WINDOW_S: Final = 60.0


class ClockOffset:
    """Of one other clock. One thread's object."""

    def __init__(self) -> None:
        self._begun = float("-inf")
        self._now = self._before = float("inf")

    def note(self, *, sent: float, at: float) -> float:
        """Take in a message; returns what to add to the sender's times, in seconds.

        Args:
          sent: when it was sent, on the sender's clock.
          at: when it came, on ours; never less than before.
        """
        if at - self._begun > WINDOW_S:
            self._begun, self._before, self._now = at, self._now, float("inf")
        self._now = min(self._now, at - sent)
        return min(self._now, self._before)
