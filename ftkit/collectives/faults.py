"""How a piece of work on the communication thread says that its generation cannot go on."""

from ftkit.core.ids import MemberId


class FaultError(Exception):
    """Ends the current generation; caught by the engine's loop."""

    def __init__(self, reason: str, lost: frozenset[MemberId] = frozenset()) -> None:
        super().__init__(reason)
        self.reason = reason
        self.lost = lost


class DoubtError(Exception):
    """A peer withdrew its memory. Why is on its way: its abort, or the end of its link."""
