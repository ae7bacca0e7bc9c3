"""Detector: from observations to verdicts. No I/O, no clock; told what was seen, and the time.

The rules, for the world of the current generation:

====================  ======================================================================
EXITED                its process ended by a signal, a code other than 0, or unknown how
NODE_LOST             its agent is silent for longer than `node_silent_s`
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

The limit is max(`max_stall_s`, `step_factor` x the slowest step seen), more in SETUP and in
the first step. It is counted from when the member last moved, the first waiter came, and its
allowance ended, whichever is last, up to when their rows were read; and it is stretched by
the time this observer was itself late since then. All members at once are never evicted for a
hang: then it is HANG_COMM or STALL. A verdict that still holds is returned at each tick.
"""

import logging
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from typing import assert_never

from ftkit.core.ids import MemberId, NodeId
from ftkit.core.verdict import Fault, Verdict
from ftkit.core.world import Member, World
from ftkit.detection import wording
from ftkit.detection.config import DetectionConfig
from ftkit.detection.observations import (
    Exited,
    LinkLost,
    NodeSilent,
    Observation,
    ObserverLate,
    RowSeen,
    WorldChanged,
)
from ftkit.detection.row import Phase
from ftkit.detection.standing import EXEMPT, Standing, behind

logger = logging.getLogger(__name__)


class Detector:
    """Judges one world at a time. Owned by one thread, which ingests and ticks."""

    def __init__(self, config: DetectionConfig) -> None:
        self._config = config
        self._world: World | None = None
        self._world_since = 0.0
        self._standings: dict[MemberId, Standing] = {}
        self._exits: dict[MemberId, Exited] = {}
        self._silent: dict[NodeId, float] = {}
        self._links: dict[MemberId, set[MemberId]] = {}
        self._slowest_step_s = 0.0
        #: (when noted, by how much) this observer was late. The newest 512 reach back further
        #: than any limit: each is at least a tick apart.
        self._late: deque[tuple[float, float]] = deque(maxlen=512)
        self._late_reported_s = 0.0
        self._last_tick: float | None = None
        self._accused_at = float("-inf")
        self._blind: dict[MemberId, float] = {}

    @property
    def limit_s(self) -> float:
        """How long a warm member may keep others waiting, before any stretch."""
        return max(self._config.max_stall_s, self._config.step_factor * self._slowest_step_s)

    @property
    def blind(self) -> Mapping[MemberId, float]:
        """Members of the world we know nothing about, as of the last tick -> for how many seconds.

        No verdict about them means nothing: their rows are missing, old, unreadable or of
        another generation.
        """
        return dict(self._blind)

    def ingest(self, observation: Observation) -> None:
        """Take in what was seen. What is older than what we hold, or not of this world, is ignored."""
        match observation:
            case RowSeen():
                self._see(observation)
            case Exited():
                self._exits.setdefault(observation.member, observation)
            case LinkLost(reporter=reporter, lost=lost):
                self._links.setdefault(lost, set()).add(reporter)
            case NodeSilent(node=node, since=since):
                self._silent[node] = since
            case WorldChanged(world=world, at=at):
                if self._world is None or world.generation > self._world.generation:
                    self._world, self._world_since = world, at
                    self._standings.clear()
                    self._links.clear()
            case ObserverLate(by_s=by_s):
                self._late_reported_s = max(self._late_reported_s, by_s)
            case _:
                assert_never(observation)

    def tick(self, now: float) -> list[Verdict]:
        """Every verdict that holds at `now`, in order of seats. Call about every `tick_s`."""
        self._note_lateness(now)
        if self._world is None:
            return []
        gone = self._gone(now)
        self._watch_blindness(now, gone)
        seen = [
            standing
            for member in self._world.members
            if member.member not in gone
            and (standing := self._standings.get(member.member))
            and now - standing.at <= self._config.blind_after_s
        ]
        hangs = self._hangs(seen, gone) or self._stuck_together(seen, gone)
        if len(seen) > 1 and sum(v.evicts for v in hangs.values()) == len(seen):
            hangs = {}  # everybody accuses everybody: the fault is between them
        desyncs = {k: v for k, v in self._desyncs(seen).items() if k not in hangs}
        verdicts = gone | hangs | desyncs
        if not verdicts:
            verdicts = self._comm_hang(seen) or self._stall(seen)
        if verdicts:
            self._accused_at = now
        return sorted(verdicts.values(), key=lambda v: v.seat)

    # What is known -----------------------------------------------------------------------

    def _see(self, seen: RowSeen) -> None:
        member = self._member(seen.member)
        if member is None:
            return
        if seen.at > self._silent.get(member.node, float("inf")):
            del self._silent[member.node]
        assert self._world is not None
        if seen.row.generation != self._world.generation or seen.row.member != seen.member:
            return
        standing = self._standings.get(seen.member)
        if standing is None:
            standing = Standing(
                member=seen.member,
                seat=seen.seat,
                node=member.node,
                row=seen.row,
                facts=seen.facts,
                at=seen.at,
            )
            standing.see(seen)
            self._standings[seen.member] = standing
            return
        if seen.at < standing.at:
            return
        began, allowance = standing.step_since, standing.row.allowance_ns / 1e9
        step_s = standing.see(seen)
        if step_s is None or began is None or standing.steps_seen <= self._config.steps_excluded:
            return
        # A step in which somebody was accused, or had leave to stand still, is not a slow step:
        # it would excuse the next hang.
        if self._accused_at < began and allowance < began:
            step_s -= self._stretch(began)
            self._slowest_step_s = max(self._slowest_step_s, step_s)

    def _member(self, member: MemberId) -> Member | None:
        if self._world is None:
            return None
        return next((m for m in self._world.members if m.member == member), None)

    def _note_lateness(self, now: float) -> None:
        gap = 0.0 if self._last_tick is None else now - self._last_tick
        late_s = gap - self._config.tick_s if gap > 2 * self._config.tick_s else 0.0
        # Both most likely speak of one pause of this host, so the longer one counts.
        late_s = max(late_s, self._late_reported_s)
        if late_s > 0:
            self._late.append((now, late_s))
        self._last_tick, self._late_reported_s = now, 0.0

    def _stretch(self, since: float) -> float:
        return sum(by_s for noted_at, by_s in self._late if noted_at > since)

    def _limit(self, one: Standing) -> float:
        if one.row.warm and one.row.phase is not Phase.SETUP:
            return self.limit_s
        return max(self.limit_s, self._config.setup_stall_s)

    def _watch_blindness(self, now: float, gone: Mapping[MemberId, Verdict]) -> None:
        assert self._world is not None
        blind: dict[MemberId, float] = {}
        for member in self._world.members:
            standing = self._standings.get(member.member)
            age_s = now - (standing.at if standing else self._world_since)
            if age_s > self._config.blind_after_s and member.member not in gone:
                blind[member.member] = age_s
        if blind.keys() != self._blind.keys():
            if blind:
                logger.warning(
                    "blind: no usable row of members %s for more than %.1f s",
                    sorted(blind),
                    self._config.blind_after_s,
                )
            else:
                logger.info("no longer blind: every member of the world is seen")
        self._blind = blind

    # The rules ---------------------------------------------------------------------------

    def _gone(self, now: float) -> dict[MemberId, Verdict]:
        """EXITED and NODE_LOST."""
        assert self._world is not None
        gone: dict[MemberId, Verdict] = {}
        lost = {
            node: since
            for node, since in self._silent.items()
            if now - since > self._config.node_silent_s + self._stretch(since)
        }
        if all(m.node in lost for m in self._world.members):
            lost = {}  # we hear nobody: that is our own deafness, and shows as `blind`
        for m in self._world.members:
            exited = self._exits.get(m.member)
            if exited is not None and exited.code != 0:
                gone[m.member] = Verdict(
                    fault=Fault.EXITED,
                    member=m.member,
                    seat=m.seat,
                    reason=wording.exit_reason(exited),
                    since_s=exited.at,
                    evidence={"code": exited.code, "signal": exited.signal}
                    | self._last_words(m.member),
                )
            elif m.node in lost:
                silent_s = now - lost[m.node]
                gone[m.member] = Verdict(
                    fault=Fault.NODE_LOST,
                    member=m.member,
                    seat=m.seat,
                    reason=f"nothing was heard of node {m.node} for {silent_s:.1f} s, over the "
                    f"{self._config.node_silent_s:.1f} s allowed, and seat {m.seat} (member "
                    f"{m.member}) is on it",
                    since_s=lost[m.node],
                    evidence={"node": m.node, "silent_s": round(silent_s, 3)}
                    | self._last_words(m.member),
                )
        return gone

    def _hangs(
        self, seen: Sequence[Standing], gone: Mapping[MemberId, Verdict]
    ) -> dict[MemberId, Verdict]:
        """Members that others wait for and that do not move."""
        verdicts: dict[MemberId, Verdict] = {}
        waiting = [w for w in seen if w.waits_since is not None]
        for one in seen:
            if one.row.phase in EXEMPT:
                continue
            waiters = [w for w in waiting if w is not one and behind(one, w)]
            if not waiters or (one.waits_since is not None and self._is_victim(one, seen, gone)):
                continue
            first = min(waiters, key=_waits_since)
            since = max(_waits_since(first), one.idle_from)
            verdict = self._hang(one, waiters, since=since, until=min(one.at, first.at))
            if verdict:
                verdicts[one.member] = verdict
        return verdicts

    def _is_victim(
        self, one: Standing, seen: Sequence[Standing], gone: Mapping[MemberId, Verdict]
    ) -> bool:
        """Whether `one`, which waits, may be waiting for somebody else than those ahead of it."""
        assert self._world is not None
        if len(seen) < self._world.size:
            return True  # it may wait for one that is gone, or that we cannot see
        return bool(gone) or any(behind(other, one) for other in seen if other is not one)

    def _stuck_together(
        self, seen: Sequence[Standing], gone: Mapping[MemberId, Verdict]
    ) -> dict[MemberId, Verdict]:
        """Everybody waits in the same place; those that cannot run there are at fault."""
        if gone or not self._all_wait(seen):
            return {}

        def cannot_run(one: Standing) -> bool:
            age_s = one.heartbeat_age_s
            return one.stopped or (age_s is not None and age_s > self._limit(one))

        stuck = [one for one in seen if cannot_run(one)]
        if len(stuck) == len(seen):
            return {}
        verdicts: dict[MemberId, Verdict] = {}
        for one in stuck:
            waiters = [w for w in seen if w not in stuck]
            since = max(_waits_since(min(waiters, key=_waits_since)), one.idle_from)
            until = min(one.at, *(w.at for w in waiters))
            verdict = self._hang(one, waiters, since=since, until=until)
            if verdict:
                verdicts[one.member] = verdict
        return verdicts

    def _hang(
        self, one: Standing, waiters: Sequence[Standing], *, since: float, until: float
    ) -> Verdict | None:
        limit_s, stretch_s = self._limit(one), self._stretch(since)
        stalled_s = until - since
        if stalled_s <= limit_s + stretch_s:
            return None
        share = one.cpu_share(stalled_s / 2)
        if one.stopped:
            fault = Fault.STOPPED
        elif share is not None and share >= self._config.busy_share:
            fault = Fault.HANG_BUSY
        else:
            fault = Fault.HANG_BLOCKED
        return Verdict(
            fault=fault,
            member=one.member,
            seat=one.seat,
            reason=wording.hang_reason(
                fault, one, waiters, stalled_s=stalled_s, limit_s=limit_s + stretch_s
            ),
            since_s=one.progress_at,
            evidence=self._evidence(one, limit_s, stretch_s, share)
            | wording.waiting(waiters)
            | {"stalled_s": round(stalled_s, 3)},
        )

    def _desyncs(self, seen: Sequence[Standing]) -> dict[MemberId, Verdict]:
        """Members that wait in another op than most at the same seq, or have left too early."""
        verdicts: dict[MemberId, Verdict] = {}
        late = [w for w in seen if w.waits_since is not None and self._overdue([w])]
        by_place: dict[tuple[int, int], list[Standing]] = {}
        for w in late:
            if w.in_collective:
                by_place.setdefault(w.pending, []).append(w)
        for group in by_place.values():
            (usual, most), *others = Counter(w.row.op for w in group).most_common()
            if not others:
                continue
            tie = others[0][1] == most
            for one in (w for w in group if tie or w.row.op != usual):
                verdicts[one.member] = self._desync(one, [w for w in group if w is not one])
        for one in (s for s in seen if s.row.phase is Phase.DONE):
            waiters = [w for w in late if behind(one, w)]
            if waiters:
                verdicts[one.member] = self._desync(one, waiters)
        return verdicts

    def _desync(self, one: Standing, waiters: Sequence[Standing]) -> Verdict:
        return Verdict(
            fault=Fault.DESYNC,
            member=one.member,
            seat=one.seat,
            reason=wording.desync_reason(one, waiters),
            since_s=one.progress_at,
            evidence=self._evidence(one, self._limit(one), 0.0, None) | wording.waiting(waiters),
        )

    def _comm_hang(self, seen: Sequence[Standing]) -> dict[MemberId, Verdict]:
        """Everybody waits, everybody runs, nobody leaves."""
        if not self._all_wait(seen) or not self._overdue(seen):
            return {}
        since = max(max(_waits_since(w), w.idle_from) for w in seen)
        return self._for_each(
            Fault.HANG_COMM,
            seen,
            lambda one: wording.comm_reason(
                seen, stalled_s=min(w.at for w in seen) - since, limit_s=self._limit(one)
            ),
            since,
        )

    def _stall(self, seen: Sequence[Standing]) -> dict[MemberId, Verdict]:
        """Nothing moves and nobody can be named."""
        assert self._world is not None
        still = [one for one in seen if one.row.phase is not Phase.DONE]
        if (
            len(seen) < self._world.size
            or any(one.row.phase in EXEMPT for one in still)
            or not self._overdue(still, factor=self._config.stall_factor)
        ):
            return {}
        since = max(one.idle_from for one in still)
        idle_s = min(one.at for one in still) - since
        return self._for_each(
            Fault.STALL,
            still,
            lambda one: wording.stall_reason(
                one, idle_s=idle_s, limit_s=self.limit_s * self._config.stall_factor
            ),
            since,
        )

    def _for_each(
        self,
        fault: Fault,
        members: Sequence[Standing],
        reason: Callable[[Standing], str],
        since: float,
    ) -> dict[MemberId, Verdict]:
        return {
            one.member: Verdict(
                fault=fault,
                member=one.member,
                seat=one.seat,
                reason=reason(one),
                since_s=since,
                evidence=self._evidence(one, self._limit(one), self._stretch(since), None)
                | wording.waiting([w for w in members if w.waits_since is not None]),
            )
            for one in members
        }

    def _all_wait(self, seen: Sequence[Standing]) -> bool:
        """Whether all members of a world of two or more are seen, and wait."""
        assert self._world is not None
        return len(seen) == self._world.size > 1 and all(w.waits_since is not None for w in seen)

    def _overdue(self, members: Sequence[Standing], *, factor: float = 1.0) -> bool:
        """Whether none of these has moved for `factor` limits."""
        if not members:
            return False
        since = max(one.idle_from for one in members)
        limit_s = max(
            # The grace of SETUP is long enough as it is.
            self._limit(one) if self._limit(one) > self.limit_s else factor * self.limit_s
            for one in members
        )
        return min(one.at for one in members) - since > max(
            limit_s, factor * self.limit_s
        ) + self._stretch(since)

    def _evidence(
        self, one: Standing, limit_s: float, stretch_s: float, share: float | None
    ) -> dict[str, object]:
        found = wording.evidence(one, limit_s=limit_s, stretched_s=stretch_s, cpu_share=share)
        return found | self._links_of(one.member)

    def _links_of(self, member: MemberId) -> dict[str, object]:
        reporters = self._links.get(member)
        return {"link_lost_by": sorted(reporters)} if reporters else {}

    def _last_words(self, member: MemberId) -> dict[str, object]:
        """Where a member that is gone was last seen."""
        one = self._standings.get(member)
        if one is None:
            return self._links_of(member)
        return self._evidence(one, self._limit(one), 0.0, None)


def _waits_since(waiter: Standing) -> float:
    assert waiter.waits_since is not None, "only members that wait are asked how long"
    return waiter.waits_since
