"""What the detector is told: frozen values, each with the time it was true.

Every time is in seconds on the detector's own monotonic clock. Rows that come from another
host are put on it first (`Row.shifted`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ftkit.core.errors import ProtocolError
from ftkit.core.ids import MemberId, NodeId, Seat
from ftkit.core.world import World
from ftkit.detection.declared import whole
from ftkit.detection.row import Awaited, OpRecord, Row
from ftkit.detection.signals import Signal


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessFacts:
    """What the kernel says of one process at one moment."""

    state: str
    """The letter of /proc/PID/stat for the main thread: R, S, D, T (stopped), t (traced), Z."""
    cpu_ticks: int
    """User and system time of all threads so far, in ticks."""
    rss_bytes: int
    wchan: str = ""
    """Kernel function the main thread sleeps in; "" when it runs or we may not know."""
    syscall: str = ""
    """Number of the system call the main thread is in; "" when none or we may not know."""
    start_ticks: int = 0
    """When the process began, in ticks since boot: a pid used again has another."""
    ticks_per_s: int = 100

    def to_json(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in self.__slots__}

    @classmethod
    def from_json(cls, value: object) -> "ProcessFacts":
        """Read what `to_json` wrote. Raises ProtocolError on anything else."""
        if not isinstance(value, Mapping):
            raise ProtocolError(f"not the facts of a process: {value!r}")
        try:
            return cls(
                state=str(value["state"]),
                cpu_ticks=whole(value["cpu_ticks"]),
                rss_bytes=whole(value["rss_bytes"]),
                wchan=str(value["wchan"]),
                syscall=str(value["syscall"]),
                start_ticks=whole(value["start_ticks"]),
                ticks_per_s=whole(value["ticks_per_s"]),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ProtocolError(f"not the facts of a process: {value!r}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class RowSeen:
    """A row was read at `at`, and /proc just before or after it."""

    member: MemberId
    seat: Seat
    row: Row
    facts: ProcessFacts | None
    """None: the process was gone."""
    at: float
    ops: Sequence[OpRecord] = ()
    """Its newest collectives, where the agent told them: while nothing moves, or it was halted."""
    awaited: Awaited | None = None
    """Whose bytes it waits for, where its data plane told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exited:
    """A member's process ended. Code and signal are both None when nobody can know."""

    member: MemberId
    seat: Seat
    code: int | None
    signal: int | None
    at: float
    out_of_memory: str = ""
    """Why it is taken to have run out of memory; empty when nothing says so."""
    ours: bool = False
    """Whether ftkit killed it: what came of another finding, and no fault of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorldChanged:
    """A generation begins."""

    world: World
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ObserverLate:
    """Whoever looks at rows or feeds the detector was held up by `by_s` since the last tick."""

    by_s: float
    who: NodeId | None = None
    """The node whose agent was; None: the one who judges."""


Observation = RowSeen | Exited | WorldChanged | ObserverLate | Signal
