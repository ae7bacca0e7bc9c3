"""Panel: every detector of a job behind one face.

Each detector takes of what it is told what it knows, and says at each tick which verdicts hold.
No I/O, no clock.
"""

from collections.abc import Sequence
from typing import Protocol

from ftkit.core.verdict import Verdict
from ftkit.detection.observations import Observation


class PanelMember(Protocol):
    """What a detector must be to sit on the panel."""

    def ingest(self, observation: Observation) -> None:
        """Take in what was seen. What is none of its business is passed over."""
        ...

    def tick(self, now: float) -> Sequence[Verdict]:
        """Every verdict that holds at `now`."""
        ...


class Panel:
    """Detectors that are told the same. Owned by one thread, which ingests and ticks."""

    def __init__(self, members: Sequence[PanelMember]) -> None:
        self._members = tuple(members)

    def ingest(self, observation: Observation) -> None:
        """Tell every detector."""
        for member in self._members:
            member.ingest(observation)

    def tick(self, now: float) -> list[Verdict]:
        """What all of them say, in order of seats."""
        verdicts = [v for member in self._members for v in member.tick(now)]
        return sorted(verdicts, key=lambda v: v.seat)
