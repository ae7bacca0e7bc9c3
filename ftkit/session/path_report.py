"""PathReport: tells the agent how fast this rank's large messages go, when there is news.

Polled by the training thread between two steps: some 20 us when it is due, and a message only
while there is little history, when a rate has changed, and once after that.
"""

from collections.abc import Callable
from time import monotonic

from ftkit.collectives.group import Group
from ftkit.collectives.meter import METERED_BYTES
from ftkit.core.ids import MemberId, Seat, Step
from ftkit.detection.signals import PathsSeen, to_json

#: Between two looks.
LOOK_S = 0.2
#: As much news as this is told at once; without any, every so often.
CHANGE, TELL_S = 0.25, 10.0
#: Looks that are all told: they make the history that later ones are compared with.
FIRST = 8


class PathReport:
    """Owned by the training thread."""

    def __init__(
        self,
        group: Group,
        member: MemberId,
        seat: Seat,
        report: Callable[[dict[str, object]], None],
    ) -> None:
        """Report through `report` what `group` carries."""
        self._group = group
        self._member = member
        self._seat = seat
        self._report = report
        self._due = 0.0
        self._told = 0
        self._told_at = 0.0
        self._follow = False
        self._sent: dict[MemberId, int] = {}
        self._rates: dict[str, float] = {}

    def poll(self, step: Step) -> None:
        """Look, if it is time, and tell."""
        now = monotonic()
        if now < self._due:
            return
        self._due = now + LOOK_S
        rates = self._look()
        if not rates:
            return
        changed = any(
            abs(rate - self._rates.get(seat, 0.0)) > CHANGE * self._rates.get(seat, 0.0)
            for seat, rate in rates.items()
        )
        if not (changed or self._follow or self._told < FIRST or now - self._told_at > TELL_S):
            return
        # Once more after a change: two slow looks in a row make a suspicion.
        self._follow = changed
        self._rates |= rates
        self._told, self._told_at = self._told + 1, now
        seen = PathsSeen(
            member=self._member,
            seat=self._seat,
            generation=self._group.world.generation,
            step=step,
            at=now,
            rates=rates,
        )
        self._report({"type": "signal", "signal": to_json(seen)})

    def _look(self) -> dict[str, float]:
        """Rates of the paths that carried something large since the last look."""
        rates: dict[str, float] = {}
        seats = {m.member: m.seat for m in self._group.world.members}
        for member, traffic in self._group.traffic.items():
            sent = traffic.sent
            fresh = sent.nbytes - self._sent.get(member, 0) >= METERED_BYTES
            if fresh and sent.rate is not None and member in seats:
                self._sent[member] = sent.nbytes
                rates[str(seats[member])] = sent.rate
        return rates
