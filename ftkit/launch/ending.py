"""Ending: the last checkpoint of a job that is over, and when nothing is left to wait for (pure).

A job that ended well, or was told to end, leaves its newest step on disk: when every rank is
gone, the newest snapshot that is complete in memory is written, unless it has been. One that
failed writes nothing more, as what made it fail may be in its state.
"""

from dataclasses import dataclass

from ftkit.core import exit_codes
from ftkit.core.ids import Step
from ftkit.core.inventory import Copy, Inventory
from ftkit.launch.checkpointing import Order, OrderEnd
from ftkit.launch.config import PREEMPTED_S
from ftkit.recovery.plan import Stop

#: After this long the last checkpoint of a job that ended well is given up: the store is broken.
LAST_S = 900.0
#: An agent that is never told that all is over ends this much later by itself.
UNTOLD_S = 60.0


def limit_s(stop: Stop) -> float:
    """How long the last checkpoint of a job that ended so may take; 0 when it writes none."""
    match stop.code:
        case 0:
            return LAST_S
        case exit_codes.INTERRUPTED:
            return PREEMPTED_S
        case _:
            return 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """What is known of a job whose plan has ended."""

    stop: Stop
    trained_to: Step | None
    """The last step that was committed; None when no rank has trained since the job began."""
    copies: tuple[Copy, ...]
    """All that the nodes hold."""
    running: bool
    """Whether there are ranks, which may still change that."""
    interrupted: bool
    """Whether somebody wants all of it to end."""


class Ending:
    """Begun when the plan has ended; judges, and is told of attempts that end."""

    def __init__(self, stop: Stop, written: Step | None) -> None:
        """Wait for the ranks.

        Args:
          stop: how the job ended.
          written: the step of the newest checkpoint that the job is known to have committed.
        """
        self._stop = stop
        self._tried = {written}
        self._since: float | None = None
        self.over = not limit_s(stop)
        """Whether nothing is left to wait for."""
        self.step: Step | None = written
        """Of the newest checkpoint that was tried."""
        self.failed = ""
        """Why it was given up; empty when it was not."""

    def due(self, end: End, now: float) -> tuple[Copy, ...]:
        """What to write next; when there is nothing, all is over. `now` is in seconds."""
        if self.over or end.running:
            return ()
        if self._since is None:
            self._since = now
        newest = Inventory(copies=end.copies).newest_complete()
        if newest is None or newest[1] in self._tried:
            self.over = True
            self._miss(end.trained_to)
            return ()
        return end.copies

    def _miss(self, last: Step | None) -> None:
        """Note that the last step of a job that ended well is not to be had, where that is so.

        Of one that was told to end, the last step may have been in capture.
        """
        missed = last is not None and (self.step is None or self.step < last)
        if self._stop.code == 0 and missed and not self.failed:
            self.step, self.failed = last, "no complete snapshot of it is left in memory"

    def too_late(self, order: Order, end: End, now: float) -> OrderEnd | None:
        """The end of an attempt that is no longer waited for; None while it is."""
        if end.interrupted and self._stop.code == 0:
            why = "interrupted"
        elif self._since is not None and now - self._since > limit_s(self._stop):
            why = f"it was not done {limit_s(self._stop):g} s after the last rank had ended"
        else:
            return None
        self.over = True
        return OrderEnd(step=order.step, failed=why)

    def take(self, outcome: OrderEnd) -> None:
        """Take note of an attempt that ended."""
        self._tried.add(outcome.step)
        self.step, self.failed = outcome.step, outcome.failed
