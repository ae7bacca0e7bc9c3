"""Panel: every detector of a job behind one face.

Each detector is told what it hears of, and says at each tick which verdicts hold.
No I/O, no clock.
"""

from collections.abc import Sequence
from typing import ClassVar, Protocol

from ftkit.core.verdict import Verdict
from ftkit.detection.observations import Observation


class PanelMember(Protocol):
    """What a detector must be to sit on the panel."""

    HEARS: ClassVar[frozenset[type]]
    """The kinds of observations that it takes in."""

    def ingest(self, observation: Observation) -> None:
        """Take in what was seen, of the kinds in `HEARS`. Other kinds are passed over."""
        ...

    def tick(self, now: float) -> Sequence[Verdict]:
        """Every verdict that holds at `now`."""
        ...


class Panel:
    """Detectors that are told the same. Owned by one thread, which ingests and ticks."""

    def __init__(self, members: Sequence[PanelMember]) -> None:
        self._members = tuple(members)
        # A row of every rank comes with every report, and most members would pass it over.
        self._hearers: dict[type, list[PanelMember]] = {}
        for member in members:
            for kind in member.HEARS:
                self._hearers.setdefault(kind, []).append(member)

    def ingest(self, observation: Observation) -> None:
        """Tell every detector that hears of such."""
        for member in self._hearers.get(type(observation), ()):
            member.ingest(observation)

    def tick(self, now: float) -> list[Verdict]:
        """What all of them say, in order of seats."""
        verdicts = [v for member in self._members for v in member.tick(now)]
        return sorted(verdicts, key=lambda v: v.seat)
