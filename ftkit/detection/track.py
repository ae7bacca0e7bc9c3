"""Track: what the detector knows of one member, and how two members stand to each other.

Times are seconds on the detector's clock. What a row shows is judged at the time the row was
read, never at the time of judgement: old rows cannot make anybody look late.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import Final

from ftkit.core.ids import MemberId, NodeId, Seat
from ftkit.detection.observations import ProcessFacts, RowSeen
from ftkit.detection.row import Awaited, Phase, Row

#: The order of a step. A member in REDUCE or VOTE waits for those that are before it.
_STEP_ORDER: Final = {Phase.DATA: 0, Phase.FORWARD: 1, Phase.REDUCE: 2, Phase.VOTE: 3}
_AFTER_VOTE: Final = 4
#: These have deadlines of their own, or nobody left to disappoint.
EXEMPT: Final = frozenset({Phase.STARTING, Phase.RECOVERY, Phase.DONE})


@dataclass(slots=True)
class Track:
    """The last row of one member, with a short history of its CPU time and its steps."""

    member: MemberId
    seat: Seat
    node: NodeId
    row: Row
    facts: ProcessFacts | None
    at: float
    step_since: float | None = None
    """When the current step was first seen; None: we came in the middle of it."""
    steps_seen: int = 0
    awaited: Awaited | None = None
    """Whose bytes it waits for, as last told."""
    cpu: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=64))

    def see(self, seen: RowSeen) -> float | None:
        """Take in a newer row. Returns the mean duration of the steps that ended, if any did."""
        duration = None
        if seen.row.step > self.row.step:
            if self.step_since is not None:
                duration = (seen.at - self.step_since) / (seen.row.step - self.row.step)
                self.steps_seen += 1
            self.step_since = seen.at
        elif seen.row.step < self.row.step:
            self.step_since = None  # rolled back: what follows is no ordinary step
        self.row, self.facts, self.at = seen.row, seen.facts, seen.at
        self.awaited = seen.awaited
        if seen.facts is not None:
            self.cpu.append((seen.at, seen.facts.cpu_ticks))
        return duration

    @property
    def progress_at(self) -> float:
        return self.row.t_progress_ns / 1e9

    @property
    def idle_from(self) -> float:
        """From when on standing still counts: the last progress, or the allowance's end."""
        return max(self.progress_at, self.row.allowance_ns / 1e9)

    @property
    def waits_since(self) -> float | None:
        """Since when this member waits for others; None when it does not."""
        if self.row.t_enter_ns:
            return self.row.t_enter_ns / 1e9
        if self.row.phase in (Phase.REDUCE, Phase.VOTE):
            return self.progress_at
        return None

    @property
    def in_collective(self) -> bool:
        return self.row.t_enter_ns != 0

    @property
    def waits_for(self) -> MemberId | None:
        """The one member that a pending send or receive waits for; None: it is no such."""
        direction, _, peer = self.row.op.partition(" ")
        if not self.in_collective or direction not in ("send", "recv") or not peer.isdigit():
            return None
        return MemberId(int(peer))

    @property
    def pending(self) -> tuple[int, int]:
        """Group and seq of the collective waited in; only with `in_collective`."""
        return self.row.group, self.row.left + 1

    @property
    def stopped(self) -> bool:
        """Whether the kernel does not schedule it (SIGSTOP, a debugger)."""
        return is_stopped(self.facts)

    @property
    def heartbeat_age_s(self) -> float | None:
        """Age of the heartbeat when the row was read; None without a heartbeat thread."""
        beat = self.row.t_heartbeat_ns
        return self.at - beat / 1e9 if beat else None

    def cpu_share(self, window_s: float) -> float | None:
        """Cores in use over the last `window_s` before the row was read; None: not known.

        A recent window, because a member may compute for long before it blocks.
        """
        if len(self.cpu) < 2 or self.facts is None:
            return None
        last_at, last = self.cpu[-1]
        at, ticks = next(
            (sample for sample in self.cpu if sample[0] >= last_at - window_s), self.cpu[-1]
        )
        if at >= last_at:
            at, ticks = self.cpu[-2]
        if at >= last_at:
            return None
        return (last - ticks) / self.facts.ticks_per_s / (last_at - at)


def is_stopped(facts: ProcessFacts | None) -> bool:
    """Whether the kernel does not schedule it (SIGSTOP, a debugger)."""
    return facts is not None and facts.state in ("T", "t")


def behind(one: Track, waiter: Track) -> bool:
    """Whether `waiter`, which waits, waits for `one` among others.

    A send or receive waits for its peer alone. In the same group seqs are compared. Across groups only a member that waits in no collective
    can be the one that is waited for. A wait that no collective tells of (REDUCE, VOTE) is for
    members in an earlier step or earlier in the step.
    """
    if waiter.in_collective:
        if (peer := waiter.waits_for) is not None:
            return one.member == peer and one.waits_for != waiter.member
        group, seq = waiter.pending
        if one.row.group == group:
            return one.row.entered < seq
        return not one.in_collective
    if one.row.step != waiter.row.step:
        return one.row.step < waiter.row.step
    return _STEP_ORDER.get(one.row.phase, _AFTER_VOTE) < _STEP_ORDER[waiter.row.phase]
