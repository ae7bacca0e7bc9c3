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
    """Nothing moves, and nobody can be named for it. Reported, never evicted for."""
    OOM = "oom"
    """The process is gone because it, or its host, ran out of memory."""

    SLOW = "slow"
    """It computes slower than the members of its role, step after step."""
    STARVED = "starved"
    """It is slow because something else has its cores: the host's fault, not the rank's."""
    IMBALANCE = "imbalance"
    """Steps wait, each time for another member: the work is uneven and nobody is at fault."""
    SLOW_COMM = "slow-comm"
    """Collectives take longer although all members come in time: a link, a NIC, a direction."""
    SLOW_IO = "slow-io"
    """Its writes or reads of storage take much longer than they did, or than its peers'."""
    DATA_STALL = "data-stall"
    """A step waited for its loader. A label, never an accusation."""
    GC_STALL = "gc-stall"
    """A step waited for Python's garbage collector. A label, never an accusation."""

    NUMERIC = "numeric"
    """NaN or infinity in what a member computed, or a loss that leaps."""
    SDC = "sdc"
    """Its state differs from that of its replicas: silent data corruption."""

    LEAK = "leak"
    """Its memory grows and will run out."""
    DISK = "disk"
    """A disk will be full before what is to be written fits, or is full."""
    CLOCK = "clock"
    """A node's wall clock is off. No other verdict rests on wall clocks."""
    FLAPPING = "flapping"
    """A node comes and goes."""
    OFFENDER = "offender"
    """A node that fails far more often than others: advice to leave it out."""


#: Faults whose member must be removed for the others to go on.
EVICT: frozenset[Fault] = frozenset(
    {
        Fault.EXITED,
        Fault.OOM,
        Fault.STOPPED,
        Fault.HANG_BUSY,
        Fault.HANG_BLOCKED,
        Fault.NODE_LOST,
    }
)

#: Faults that say how the job fares, of no member in particular: nobody is accused of them.
ACCUSES_NOBODY: frozenset[Fault] = frozenset(
    {Fault.STALL, Fault.IMBALANCE, Fault.DATA_STALL, Fault.GC_STALL}
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
    confidence: float = 1.0
    """How sure, above 0 and at most 1. What the kernel says is 1; what is inferred is less."""
    peer: Seat | None = None
    """The other end, where the fault lies between two: bytes from `seat` to `peer` are late."""
    suspected: bool = False
    """Named and not yet convicted: others wait longer than is usual for this job, and not yet for
    as long as they may have to. Looked into, and nobody is removed for it."""

    @property
    def evicts(self) -> bool:
        """Whether the member must go for the others to continue."""
        return self.fault in EVICT and not self.suspected
