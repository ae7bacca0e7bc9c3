"""Verdict: what detection concluded about one member, and the evidence for it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from ftkit.core.ids import MemberId, Seat


class Fault(StrEnum):
    """What is wrong. The operator's words, one for each different remedy."""

    EXITED = "exited"
    """The process is gone: a signal or an exit code other than 0."""
    STOPPED = "stopped"
    """The process exists and is not scheduled (SIGSTOP, a debugger, the freezer)."""
    HANG_BUSY = "hang-busy"
    """Others wait for it; it burns CPU without progress (often a held GIL)."""
    HANG_BLOCKED = "hang-blocked"
    """Others wait for it; it sleeps in user code, outside any collective."""
    HANG_COMM = "hang-comm"
    """Every member entered the same collective and none leaves it."""
    DESYNC = "desync"
    """Members wait in different collectives: the script's ranks disagree."""
    NODE_LOST = "node-lost"
    """The agent of a node is gone, and with it all its members."""
    STALL = "stall"
    """Nobody waits for anybody, and yet nothing moves. Reported, never evicted for."""


#: Faults whose member must be removed for the others to go on.
EVICT: frozenset[Fault] = frozenset(
    {Fault.EXITED, Fault.STOPPED, Fault.HANG_BUSY, Fault.HANG_BLOCKED, Fault.NODE_LOST}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One conclusion. Levels, not edges: while it holds it is said again each tick."""

    fault: Fault
    member: MemberId
    seat: Seat
    reason: str
    """One sentence for people, with the numbers."""
    since_s: float
    """Monotonic time at which the fault is believed to have begun."""
    evidence: Mapping[str, object] = field(default_factory=dict)
    """JSON-safe facts the conclusion rests on."""

    @property
    def evicts(self) -> bool:
        """Whether the member must go for the others to continue."""
        return self.fault in EVICT
