"""The rules: from how the members of a world stand to each other, what is wrong with whom.

The rules, for the world of the current generation:

====================  ======================================================================
EXITED                its process ended by a signal, a code other than 0, or unknown how
STOPPED, HANG_BUSY,   another member waits for it, in a collective or vote that it has not
HANG_BLOCKED          entered, and it makes no progress, both for longer than the limit. Who
                      waits himself for somebody behind him is a victim and not named
the same, inside a    everybody waits in the same place, and it alone is stopped, or its
collective            heartbeat alone stands still
DESYNC                waits in another op than others at the same seq; or has ended its
                      training while others wait for it
HANG_COMM             everybody waits and runs, and nobody leaves
STALL                 nothing moves for `stall_factor` limits, and no rule above speaks
====================  ======================================================================

They are applied twice: with the limit after which a member is removed (`judge`), and with the
shorter one after which it is named (`suspicions`), which also asks that nothing in the whole job
has moved for so long.

The limit is max(`max_stall_s`, `step_factor` x the slowest step seen), more in SETUP and in
the first step. It is counted from when the member last moved, the first waiter came, and its
allowance ended, whichever is last, up to when their rows were read; and it is stretched by
the time this observer was itself late since then. All members at once are never evicted for a
hang: then it is HANG_COMM or STALL. A verdict that still holds is returned at each tick.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from ftkit.core.ids import MemberId
from ftkit.core.verdict import Fault, Verdict
from ftkit.detection import awaits, wording
from ftkit.detection.config import NAMED_FLOOR_S, DetectionConfig
from ftkit.detection.row import Phase
from ftkit.detection.track import EXEMPT, Track, behind

Verdicts = dict[MemberId, Verdict]

#: Of those whose bytes one member waits for, and of the paths at fault, so many are told.
_SENDERS_MAX, _PATHS_MAX = 8, 64

#: How sure one is of a member that is only named: all there is, is that it takes unusually long.
SUSPECTED = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """One look at the members of a world. Read, not kept."""

    config: DetectionConfig
    size: int
    """Members of the world, seen or not."""
    gone: bool
    """Whether any member has exited; such are not in `seen`."""
    seen: Sequence[Track]
    """The members with a recent row, in order of seats."""
    limit_s: float
    """The limit of a warm member."""
    stretch_s: Callable[[float], float]
    """By how much this observer was late since then."""
    usual_s: Callable[[Phase], float | None] = lambda phase: None
    """How long the job usually stands still in a phase; None: nobody knows yet."""
    naming: bool = False
    """Whether the limit is that after which a member is named, not removed."""

    def limit(self, one: Track) -> float:
        """How long this member may keep others waiting."""
        if not one.row.warm or one.row.phase is Phase.SETUP:
            return max(self.limit_s, self.config.setup_stall_s)
        usual_s = self.usual_s(one.row.phase)
        if not self.naming or usual_s is None:
            return self.limit_s
        return min(self.limit_s, max(NAMED_FLOOR_S, self.config.named_factor * usual_s))

    def cannot_run(self, one: Track) -> bool:
        """Whether this member is stopped, or so still that not even its heartbeat comes."""
        age_s = one.heartbeat_age_s
        missed_s = max(self.limit(one), self.config.heartbeat_missed_s)
        return one.stopped or (age_s is not None and age_s > missed_s)

    @property
    def least_limit_s(self) -> float:
        """No member's limit is less."""
        return min(self.limit_s, NAMED_FLOOR_S) if self.naming else self.limit_s

    @property
    def all_move(self) -> bool:
        """Whether no member has stood still for as long as any rule asks: the usual case."""
        least_s = self.least_limit_s
        return all(one.at - one.idle_from <= least_s for one in self.seen)

    def frozen(self) -> bool:
        """Whether the whole job stands still, each member for longer than it may."""
        if self.gone or not self.complete:
            return False
        moved = max(one.progress_at for one in self.seen)
        still_s = min(one.at for one in self.seen) - moved
        if still_s <= self.least_limit_s:
            return False
        return still_s > min(self.limit(one) for one in self.seen) + self.stretch_s(moved)

    @property
    def complete(self) -> bool:
        """Whether every member of the world is seen."""
        return len(self.seen) == self.size

    @property
    def all_wait(self) -> bool:
        """Whether this is a world of two or more in which everybody waits."""
        return self.complete and self.size > 1 and all(w.waits_since is not None for w in self.seen)

    def overdue(self, members: Sequence[Track], *, factor: float = 1.0) -> bool:
        """Whether none of these has moved for `factor` limits, or for its grace if longer."""
        if not members:
            return False
        since = max(one.idle_from for one in members)
        limit_s = max(self.limit(one) for one in members)
        if not self.naming:
            limit_s = max(limit_s, factor * self.limit_s)
        return min(one.at for one in members) - since > limit_s + self.stretch_s(since)


def judge(view: View) -> Verdicts:
    """What is wrong with those that are there. STALL and HANG_COMM only when nothing else is."""
    if view.all_move:
        return {}
    hung = hangs(view) or stuck_together(view)
    if len(view.seen) > 1 and len(hung) == len(view.seen):
        hung = {}  # everybody accuses everybody: the fault is between them
    verdicts = desyncs(view) | hung
    if not verdicts and not view.gone:
        verdicts = comm_hang(view) or stall(view)
    return verdicts


def suspicions(view: View) -> Verdicts:
    """Whom to name before anybody has to go: the same rules with the shorter limit."""
    named = replace(view, naming=True)
    if not named.frozen():
        return {}
    hung = hangs(named) or stuck_together(named)
    if len(named.seen) > 1 and len(hung) == len(named.seen):
        hung = {}
    found = desyncs(named) | hung or comm_hang(named)
    return {
        member: replace(
            verdict,
            suspected=True,
            confidence=SUSPECTED,
            reason=wording.suspicion(verdict, removed_s=view.limit_s),
        )
        for member, verdict in found.items()
    }


def hangs(view: View) -> Verdicts:
    """Members that others wait for and that do not move."""
    verdicts: Verdicts = {}
    places = _by_place(w for w in view.seen if w.waits_since is not None)
    for one in view.seen:
        # Most members fail this cheap test, and only those that pass are compared with others.
        if one.at - one.idle_from <= view.least_limit_s or one.row.phase in EXEMPT:
            continue
        if not view.overdue([one]):
            continue
        waiters = [w for place in places if behind(one, place[0]) for w in place]
        if not waiters or (one.waits_since is not None and _may_be_victim(view, one)):
            continue
        first = min(waiters, key=_waits_since)
        since = max(_waits_since(first), one.idle_from)
        verdict = _hang(view, one, waiters, since=since, until=min(one.at, first.at))
        if verdict:
            verdicts[one.member] = verdict
    return verdicts


def stuck_together(view: View) -> Verdicts:
    """Everybody waits; those that cannot run where they wait are at fault."""
    if view.gone or not view.all_wait:
        return {}

    stuck = [one for one in view.seen if view.cannot_run(one)]
    waiters = [one for one in view.seen if not view.cannot_run(one)]
    if not waiters:
        return {}
    verdicts: Verdicts = {}
    for one in stuck:
        since = max(min(_waits_since(w) for w in waiters), one.idle_from)
        until = min(one.at, *(w.at for w in waiters))
        verdict = _hang(view, one, waiters, since=since, until=until)
        if verdict:
            verdicts[one.member] = verdict
    return verdicts


def desyncs(view: View) -> Verdicts:
    """Members that wait in another op than most at the same seq, or have left too early."""
    verdicts: Verdicts = {}
    late = [w for w in view.seen if w.waits_since is not None and view.overdue([w])]
    places = _by_place(late)
    for place in places:
        if not place[0].in_collective:
            continue
        (usual, most), *others = Counter(w.row.op for w in place).most_common()
        if not others:
            continue
        tie = others[0][1] == most
        for one in (w for w in place if tie or w.row.op != usual):
            verdicts[one.member] = _desync(view, one, [w for w in place if w is not one])
    for one in (s for s in view.seen if s.row.phase is Phase.DONE):
        waiters = [w for place in places if behind(one, place[0]) for w in place]
        if waiters:
            verdicts[one.member] = _desync(view, one, waiters)
    return verdicts


def comm_hang(view: View) -> Verdicts:
    """Everybody waits, everybody runs, nobody leaves."""
    if not view.all_wait or not view.overdue(view.seen):
        return {}
    since = max(max(_waits_since(w), w.idle_from) for w in view.seen)
    stalled_s = min(w.at for w in view.seen) - since
    waits = awaits.awaited(view.seen)
    silent = awaits.roots(waits)
    limit_s = max(view.limit(one) for one in view.seen)
    reason = wording.comm_reason(view.seen, silent, stalled_s=stalled_s, limit_s=limit_s)
    told: dict[str, object] = {
        "awaits": {str(seat): list(senders[:_SENDERS_MAX]) for seat, senders in waits.items()},
        "silent_paths": [list(path) for path in silent[:_PATHS_MAX]],
    }
    first, *others = view.seen
    # What is known of all is told of the first alone: told of each, it grows with their square.
    verdict = _verdict(view, Fault.HANG_COMM, first, reason, view.seen, since=since)
    verdicts = {first.member: replace(verdict, evidence={**verdict.evidence, **told})}
    for one in others:
        verdicts[one.member] = _verdict(
            view, Fault.HANG_COMM, one, reason, (), since=since, told_of=first
        )
    return verdicts


def stall(view: View) -> Verdicts:
    """Nothing moves and nobody can be named."""
    still = [one for one in view.seen if one.row.phase is not Phase.DONE]
    if (
        not view.complete
        or any(one.row.phase in EXEMPT for one in still)
        or not view.overdue(still, factor=view.config.stall_factor)
    ):
        return {}
    since = max(one.idle_from for one in still)
    idle_s = min(one.at for one in still) - since
    limit_s = view.config.stall_factor * view.limit_s
    waiters = [w for w in still if w.waits_since is not None]
    first = still[0]
    return {
        one.member: _verdict(
            view,
            Fault.STALL,
            one,
            wording.stall_reason(one, idle_s=idle_s, limit_s=limit_s),
            waiters if one is first else (),
            since=since,
            told_of=None if one is first else first,
        )
        for one in still
    }


def _may_be_victim(view: View, one: Track) -> bool:
    """Whether `one`, which waits, may be waiting for somebody other than those ahead of it."""
    if view.gone or not view.complete:
        return True  # it may wait for one that is gone, or that we cannot see
    others = [other for other in view.seen if other is not one]
    if any(behind(other, one) for other in others):
        return True
    # One that was stopped in the same place may have sent its part to those that went on, and
    # not to this one.
    beside = [w for w in others if w.waits_since is not None and _place(w) == _place(one)]
    return not view.cannot_run(one) and any(view.cannot_run(w) for w in beside)


def _hang(
    view: View, one: Track, waiters: Sequence[Track], *, since: float, until: float
) -> Verdict | None:
    stalled_s = until - since
    limit_s = view.limit(one) + view.stretch_s(since)
    if stalled_s <= limit_s:
        return None
    # Half the stall, so that what it computed before it blocked does not make it busy.
    share = one.cpu_share(stalled_s / 2)
    if one.stopped:
        fault = Fault.STOPPED
    elif share is not None and share >= view.config.busy_share:
        fault = Fault.HANG_BUSY
    else:
        fault = Fault.HANG_BLOCKED
    reason = wording.hang_reason(fault, one, waiters, stalled_s=stalled_s, limit_s=limit_s)
    verdict = _verdict(view, fault, one, reason, waiters, since=since)
    facts = {"stalled_s": round(stalled_s, 3), "cpu_share": share and round(share, 3)}
    return replace(verdict, since_s=one.progress_at, evidence={**verdict.evidence, **facts})


def _desync(view: View, one: Track, waiters: Sequence[Track]) -> Verdict:
    reason = wording.desync_reason(one, waiters)
    return _verdict(view, Fault.DESYNC, one, reason, waiters, since=one.progress_at)


def _verdict(
    view: View,
    fault: Fault,
    one: Track,
    reason: str,
    waiters: Sequence[Track],
    *,
    since: float,
    told_of: Track | None = None,
) -> Verdict:
    """The verdict with its evidence; who waits stands in that of `told_of`, if there is one."""
    limits: dict[str, object] = {
        "limit_s": round(view.limit(one), 3),
        "stretched_s": round(view.stretch_s(since), 3),
    }
    return Verdict(
        fault=fault,
        member=one.member,
        seat=one.seat,
        reason=reason,
        since_s=since,
        evidence=wording.evidence(one)
        | limits
        | (
            wording.waiting([w for w in waiters if w is not one])
            if told_of is None
            else {"waiters_at_seat": told_of.seat}
        ),
    )


def _by_place(waiting: Iterable[Track]) -> list[list[Track]]:
    """Those that wait, by what they wait in: `behind` is the same for all of one place."""
    places: dict[object, list[Track]] = {}
    for w in waiting:
        places.setdefault(_place(w), []).append(w)
    return list(places.values())


def _place(waiter: Track) -> object:
    return waiter.pending if waiter.in_collective else (waiter.row.phase, waiter.row.step)


def _waits_since(waiter: Track) -> float:
    assert waiter.waits_since is not None, "only members that wait are asked how long"
    return waiter.waits_since
