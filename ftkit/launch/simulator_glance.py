"""Glance: what an agent sees of a simulated rank, in its row and in /proc."""

from typing import NamedTuple

from ftkit.core.ids import Generation, MemberId, Seat, Step
from ftkit.detection.observations import ProcessFacts
from ftkit.detection.row import Phase, Row
from ftkit.launch.judge import SeatRow


class Glance(NamedTuple):
    """A look at a rank, before it is made a row: most are never judged, a newer one having come."""

    member: MemberId
    seat: Seat
    shown: tuple[Phase, Step, Generation]
    moved_s: float
    beat_s: float
    warm: bool
    stopped: bool

    def row(self) -> SeatRow:
        """As an agent would tell it. A simulated rank's collectives leave no trace."""
        phase, step, generation = self.shown
        row = Row(
            member=self.member,
            pid=self.member + 1,
            generation=generation,
            step=step,
            phase=phase,
            group=0,
            entered=-1,
            left=-1,
            op="",
            t_progress_ns=int(self.moved_s * 1e9),
            t_enter_ns=0,
            t_heartbeat_ns=int(self.beat_s * 1e9),
            allowance_ns=0,
            warm=self.warm,
        )
        facts = ProcessFacts(state="T" if self.stopped else "S", cpu_ticks=0, rss_bytes=0)
        return SeatRow(self.seat, row, facts)
