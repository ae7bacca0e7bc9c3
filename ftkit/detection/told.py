"""Told: what the ranks have found out among themselves, as verdicts. No I/O, no clock.

Ranks that compare what they hold know who differs in the same step, better than anybody who
looks at rows from outside. Such a verdict holds for a while after it was told, so that what is
found again and again is one incident.
"""

from typing import ClassVar

from ftkit.core.ids import MemberId
from ftkit.core.verdict import Fault, Verdict
from ftkit.detection.observations import Observation
from ftkit.detection.signals import Found

#: How long a verdict holds that nobody repeats.
HOLD_S = 5.0


class Told:
    """Keeps what is told of each member and fault, the newest. Owned by one thread."""

    HEARS: ClassVar[frozenset[type]] = frozenset({Found})

    def __init__(self, hold_s: float = HOLD_S) -> None:
        """Keep each for `hold_s` after it was found last: longer than it is on its way here."""
        self._hold_s = hold_s
        self._found: dict[tuple[MemberId, Fault], tuple[Found, float]] = {}
        """With the time at which it was told first."""

    def ingest(self, observation: Observation) -> None:
        """Take in a `Found` of a fault that this version knows; pass over all else."""
        if not isinstance(observation, Found) or observation.fault not in set(Fault):
            return
        key = observation.member, Fault(observation.fault)
        before = self._found.get(key)
        if before is None or observation.at >= before[0].at:
            since = observation.at if before is None else before[1]
            self._found[key] = observation, since

    def tick(self, now: float) -> list[Verdict]:
        """What was told in the last `hold_s`."""
        self._found = {
            key: value for key, value in self._found.items() if now - value[0].at <= self._hold_s
        }
        return [
            Verdict(
                fault=fault,
                member=member,
                seat=found.seat,
                reason=found.reason,
                since_s=since,
                evidence={**found.evidence, "step": found.step},
                confidence=found.confidence,
                peer=found.peer,
            )
            for (member, fault), (found, since) in self._found.items()
        ]
