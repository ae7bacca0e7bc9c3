"""Pace: when an agent looks at its rows, and when it tells. Pure.

While training goes on it tells at every tick, in a job of very many nodes less often. While nothing
on its node moves it tells more often, the more often the shorter that has lasted: a job that stood
still for half a second is looked at each tenth of a second, one that did for a minute each half.
"""

from dataclasses import dataclass

#: Nothing is reported early before nothing has moved for so long.
STILL_S = 0.4
#: While nothing moves, a report comes after this part of the time that it has not.
_PART = 8
#: A look that comes this late says that the host is busy.
LATE_S = 0.02


@dataclass(slots=True)
class Pace:
    """One agent's. `now` is always the same clock."""

    look_s: float
    report_s: float
    """Between two reports while ranks train."""
    soonest_s: float
    """Between two reports while nothing moves, at the least: with many nodes it is longer."""
    next_look: float
    told: float = float("-inf")
    late_s: float = 0.0
    """By how much looks were late since the last report, together."""

    def woke(self, now: float) -> bool:
        """Whether it is time to look. Notes how late it is, and when the next look is due."""
        if now < self.next_look:
            return False
        late_s = now - self.next_look
        if late_s > LATE_S:
            self.late_s += late_s
        self.next_look = now + self.look_s
        return True

    def tells(self, now: float, still_s: float | None) -> bool:
        """Whether it is time to report, after nothing has moved for `still_s` (None: unknown)."""
        since = now - self.told
        # A look comes a little early or late: half of one is near enough.
        if since >= self.report_s - self.look_s / 2:
            return True
        if still_s is None or still_s < STILL_S:
            return False
        early_s = min(max(self.soonest_s, still_s / _PART), self.report_s)
        return since >= early_s - self.look_s / 2

    def reported(self, now: float) -> float:
        """A report goes out. Returns how late looks were since the last one."""
        late_s, self.told, self.late_s = self.late_s, now, 0.0
        return late_s


#: After a look the coordinator rests for so many times what it took: reports come in meanwhile.
RESTS = 9


@dataclass(slots=True)
class Rest:
    """When the coordinator may look again at what has come in.

    A look costs as much as the job is large, and every report asks for one: without a rest ten
    thousand ranks keep it at looking. In a small job it is a fraction of a millisecond.
    """

    tick_s: float
    until: float = float("-inf")
    owed: bool = False
    """Whether something has come in that was not looked at."""

    def due(self, now: float) -> bool:
        """Whether to look now. If not, one is owed at `until`."""
        self.owed = now < self.until
        return not self.owed

    def looked(self, began: float, ended: float) -> None:
        """A look has ended."""
        self.until = ended + min(RESTS * (ended - began), self.tick_s)
