"""Clock: this rank's clock is raised while ranks are away, and given back afterwards."""

import logging

from ftkit.core.trace import Trace
from ftkit.recovery.clocks import ClockGovernor

logger = logging.getLogger(__name__)


class Clock:
    """Of one step loop; the training thread's. A governor that fails is not asked again."""

    def __init__(self, governor: ClockGovernor | None, trace: Trace, *, seats: int) -> None:
        """Nothing is raised yet; without a governor, nothing ever is."""
        self._governor, self._trace, self._seats = governor, trace, seats
        self._raised = False

    def entered(self, size: int) -> None:
        """A world of `size` ranks is about to train. Blocks only where that changes anything."""
        if self._governor is None or (size < self._seats) == self._raised:
            return
        try:
            if self._raised:
                self._governor.release()
                self._trace.event("clock-set", action="released", members=size)
            else:
                now = self._governor.range()
                self._governor.lock(now.highest)
                self._trace.event(
                    "clock-set", action="raised", members=size, mhz=now.highest, before=now.now
                )
            self._raised = not self._raised
        except OSError as error:  # also PermissionError
            self._governor = None
            logger.warning("the clock stays as it is: %s", error)
            self._trace.event("clock-set", action="refused", members=size, reason=str(error))

    def close(self) -> None:
        """Give back what was raised."""
        if self._raised:
            self.entered(self._seats)
