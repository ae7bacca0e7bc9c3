"""Levels: from verdicts that are said at each tick to the moments at which one begins or ends.

A verdict that is not said for a moment and then again is the same one: a member that stops and
goes on every few seconds gives one entry, not hundreds.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from ftkit.core.ids import MemberId, Seat
from ftkit.core.verdict import Fault, Verdict

#: The kinds of one matter: which of them it is may become clearer with time.
_HANG = frozenset({Fault.STOPPED, Fault.HANG_BUSY, Fault.HANG_BLOCKED})


@dataclass(frozen=True, slots=True, kw_only=True)
class Over:
    """A verdict that no longer holds, as it was said last."""

    verdict: Verdict
    lasted_s: float
    """From when the fault is believed to have begun until it was last said."""


@dataclass(slots=True)
class _Level:
    last: Verdict
    at: float
    said: set[tuple[Fault, bool, object]] = field(default_factory=set)


class Levels:
    """What is being said of whom. Owned by one thread."""

    def __init__(self, linger_s: float) -> None:
        """A verdict is over once it was not said for `linger_s`."""
        self._linger_s = linger_s
        self._levels: dict[tuple[MemberId, str, Seat | None], _Level] = {}

    def take(self, verdicts: Iterable[Verdict], now: float) -> tuple[list[Verdict], list[Over]]:
        """Compare with what was said before.

        Returns:
          The verdicts that are new, that say another kind, or that became certain; and those
          that are over. A verdict that removes its member is never over: the member is.
        """
        fresh = list[Verdict]()
        for verdict in verdicts:
            matter = "hang" if verdict.fault in _HANG else verdict.fault.value
            key = (verdict.member, matter, verdict.peer)
            level = self._levels.setdefault(key, _Level(verdict, now))
            level.last, level.at = verdict, now
            what = (verdict.fault, verdict.suspected, verdict.evidence.get("where"))
            if what not in level.said:
                level.said.add(what)
                fresh.append(verdict)
        return fresh, self._end(now - self._linger_s)

    def close(self) -> list[Over]:
        """The job has ended, and with it all that was being said."""
        return self._end(float("inf"))

    def _end(self, before: float) -> list[Over]:
        """Take off what was last said before then."""
        over = list[Over]()
        for key, level in list(self._levels.items()):
            if level.at < before:
                del self._levels[key]
                if not level.last.evicts:
                    lasted_s = max(0.0, level.at - level.last.since_s)
                    over.append(Over(verdict=level.last, lasted_s=lasted_s))
        return over
