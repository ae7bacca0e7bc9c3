"""DetectionConfig: one number, `max_stall_s`, from which every other time of detection follows."""

import math
from dataclasses import dataclass

#: Below this a host that is merely busy looks like a hang: with a floor of 0.5 s on a shared
#: virtual machine, 1 healthy run in 5 was called hung.
MAX_STALL_FLOOR_S = 1.0

#: A hang is named after this at the earliest. With a fifth of a second to look, to tell and to
#: judge, it is named within a second. Naming removes nobody, so a host that was merely busy for
#: so long costs an entry in the events.
NAMED_FLOOR_S = 0.8

#: For so long the one coordinator may be busy with the report of a node, of eight ranks say: the
#: more nodes there are, the less often each reports. It takes half of that, the rest is reserve.
REPORT_COST_S = 0.0008


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectionConfig:
    """How long the job may stand still before somebody is named for it."""

    max_stall_s: float = 30.0
    """Seconds others may wait for a member that makes no progress before it is a suspect."""

    step_factor: float = 2.0
    """The limit is at least this many times the slowest step seen. Kept small: a job whose
    steps take a minute needs more than `max_stall_s`, not ten times as much."""

    steps_excluded: int = 2
    """Steps of each member that do not count towards the slowest: they compile and warm up."""

    setup_factor: float = 10.0
    """A member in SETUP or in its first step may stand still this many times `max_stall_s`."""

    stall_factor: float = 5.0
    """When nobody can be named, a job that does not move for this many limits is reported."""

    busy_share: float = 0.1
    """A silent member that uses at least this share of one core is busy, not blocked. A
    heartbeat thread alone uses under 0.01; a spinning process on a host with ten others
    that spin still gets 0.1."""

    named_factor: float = 5.0
    """A hang is named when the job stands still for this many times the 99.9th percentile of
    what is usual for the phase (`tempo`), and `NAMED_FLOOR_S` at least."""

    nodes: int = 1
    """How many agents report to one coordinator."""

    def __post_init__(self) -> None:
        if self.nodes < 1:
            raise ValueError(f"nodes is {self.nodes}, must be at least 1")
        if not (math.isfinite(self.max_stall_s) and self.max_stall_s >= MAX_STALL_FLOOR_S):
            raise ValueError(
                f"max_stall_s is {self.max_stall_s}, must be at least {MAX_STALL_FLOOR_S}: "
                "below it a busy host cannot be told from a hang"
            )
        if not 1.0 <= self.step_factor <= 10.0:
            raise ValueError(
                f"step_factor is {self.step_factor}, must be in 1..10: under 1 a step as slow "
                "as one already seen would be a hang"
            )
        if self.steps_excluded < 0:
            raise ValueError(f"steps_excluded is {self.steps_excluded}, must not be negative")
        if not self.setup_factor >= 1.0:
            raise ValueError(
                f"setup_factor is {self.setup_factor}, must be at least 1: starting is never "
                "faster than a step"
            )
        if not self.stall_factor >= 1.0:
            raise ValueError(
                f"stall_factor is {self.stall_factor}, must be at least 1: without a culprit "
                "we may not be quicker than with one"
            )
        if not 0.0 < self.busy_share <= 1.0:
            raise ValueError(f"busy_share is {self.busy_share}, must be in (0, 1]")
        if not self.named_factor >= 1.0:
            raise ValueError(
                f"named_factor is {self.named_factor}, must be at least 1: what is usual is no hang"
            )

    @property
    def tick_s(self) -> float:
        """Seconds between two looks at the rows and two judgements: 20 in a stall, 0.5 at most."""
        return min(0.5, self.max_stall_s / 20)

    @property
    def report_s(self) -> float:
        """Seconds between two reports of an agent whose ranks are well: a tick, more in large jobs."""
        return max(self.tick_s, 2 * self.soonest_s)

    @property
    def soonest_s(self) -> float:
        """Seconds between two reports of an agent at the least, changes apart.

        When the whole job stands still all agents want to tell of it at once and often, and a
        coordinator that falls behind names nobody.
        """
        return max(self.look_s, self.nodes * REPORT_COST_S)

    @property
    def look_s(self) -> float:
        """Seconds between two looks of an agent at its own rows: 0.1 at most.

        It reports at this pace only while nothing on its node moves.
        """
        return min(0.1, self.tick_s)

    @property
    def heartbeat_interval_s(self) -> float:
        """Seconds between two stamps of a rank's heartbeat thread: 20 in a stall, 0.2 at most."""
        return min(0.2, self.max_stall_s / 20)

    @property
    def heartbeat_missed_s(self) -> float:
        """A heartbeat older than this stands still. On two busy cores one came 0.26 s late."""
        return max(NAMED_FLOOR_S, 3 * self.heartbeat_interval_s)

    @property
    def blind_after_s(self) -> float:
        """Seconds without a usable row after which we no longer speak about a member."""
        return max(8 * self.tick_s, 4 * self.report_s, self.max_stall_s / 4)

    @property
    def setup_stall_s(self) -> float:
        """Seconds a member in SETUP or in its first step may stand still."""
        return self.setup_factor * self.max_stall_s
