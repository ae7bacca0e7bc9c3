"""CoordinatorTries: when an engine gives up on coordinators that end, one after another. Pure."""

from typing import Final

from ftkit.core import exit_codes
from ftkit.recovery.plan import Stop

TRIES_MAX: Final = 10
#: One that led for this long got somewhere: what ended it is not what ended the one before.
LED_S: Final = 60.0
#: One that was killed says nothing of the next, unless it never came to live.
KILLED_S: Final = 1.0


class CoordinatorTries:
    """Counts those that ended early in a row."""

    def __init__(self) -> None:
        self._in_a_row = 0

    def ended(self, *, lived_s: float, error: str = "") -> Stop | None:
        """A coordinator ended and recorded no end of the job.

        Args:
          lived_s: since it was started.
          error: by which it ended; empty where it was killed, or nobody knows.

        Returns:
          The job's end, where another would fare no better; None: start another.
        """
        early = lived_s < (LED_S if error else KILLED_S)
        self._in_a_row = self._in_a_row + 1 if early else 0
        if self._in_a_row < TRIES_MAX:
            return None
        last = f": {error}" if error else ""
        return Stop(
            code=exit_codes.UNRECOVERABLE,
            reason=f"{self._in_a_row} coordinators in a row ended early{last}",
        )
