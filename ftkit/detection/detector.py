"""Detector: from observations to verdicts. No I/O, no clock; told what was seen, and the time.

It keeps what is known of each member (`track`), judges who is gone, and how long a stall
may last; `rules` say what follows for those that are there. A verdict that still holds is
returned at each tick. All members at once are never evicted for a hang: then it is HANG_COMM
or STALL.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from ftkit.core.ids import Generation, MemberId, Step
from ftkit.core.verdict import Fault, Verdict
from ftkit.core.world import Member, World
from ftkit.detection import desync, rules, wording
from ftkit.detection.config import NAMED_FLOOR_S, DetectionConfig
from ftkit.detection.desync import Disagreement, disagreements
from ftkit.detection.halts import Halts
from ftkit.detection.observations import (
    Exited,
    Observation,
    ObserverLate,
    RowSeen,
    WorldChanged,
)
from ftkit.detection.row import OpRecord, Phase
from ftkit.detection.rules import View
from ftkit.detection.stretch import Stretch
from ftkit.detection.tempo import Tempo
from ftkit.detection.track import EXEMPT, Track

logger = logging.getLogger(__name__)


#: Records are told by agents only now and then; older ones speak of what is over. Longer where two
#: reports of an agent are further apart.
_TAILS_S = 2.0

#: Where members differ, so long others may come to that collective or tell of it: at least until
#: every agent has told.
_AWAIT_S = 0.5

#: Who ended so long before a world began is not about to be in one.
_EXITS_S = 600.0

#: Steps are counted to know how often something occurs: a leap in their number is no history.
_STEPS_A_LOOK = 1000

#: Of members that are not seen, so many are told.
_NAMED_MAX = 16

#: Times of one moment, read off another host's clock now and later, differ by less.
_SAME_S = 0.01


@dataclass(frozen=True, slots=True)
class _Still:
    """The job as it stood still when it was last looked at."""

    moved: float
    """When anybody in it last moved."""
    lasted_s: float
    phases: frozenset[Phase]
    """Of those that the others wait for; of all, where all wait."""


class Detector:
    """Judges one world at a time. Owned by one thread, which ingests and ticks."""

    HEARS: ClassVar[frozenset[type]] = frozenset({Exited, ObserverLate, RowSeen, WorldChanged})

    def __init__(self, config: DetectionConfig) -> None:
        self._config = config
        self._world: World | None = None
        self._world_since = 0.0
        self._members: dict[MemberId, Member] = {}
        self._tracks: dict[MemberId, Track] = {}
        self._exits: dict[MemberId, Exited] = {}
        self._slowest_step_s = 0.0
        self._tails_s = max(_TAILS_S, 2 * config.report_s)
        self._await_s = max(_AWAIT_S, config.report_s)
        self._stretch = Stretch(config.tick_s, config.report_s)
        self._accused_at = float("-inf")
        self._blind: dict[MemberId, float] = {}
        self._tails: dict[MemberId, tuple[float, Sequence[OpRecord]]] = {}
        #: Where members differ: when that was first seen, and what was made of it.
        self._parted: dict[tuple[Generation, int, int], tuple[float, Disagreement]] = {}
        self._tempo = Tempo()
        self._halts = Halts()
        self._still: _Still | None = None
        self._newest_step: Step | None = None

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
            case WorldChanged(world=world, at=at):
                if self._world is None or world.generation > self._world.generation:
                    self._world, self._world_since = world, at
                    self._members = {m.member: m for m in world.members}
                    self._tracks.clear()
                    self._halts.keep(world)
                    self._still = None
                    self._exits = {
                        m: e
                        for m, e in self._exits.items()
                        if m in self._members or at - e.at < _EXITS_S
                    }
                    recent = world.generation - 2
                    self._parted = {k: d for k, d in self._parted.items() if k[0] >= recent}
            case ObserverLate(by_s=by_s, who=who):
                self._stretch.note(who, by_s)
            case _:
                pass  # a signal: for other detectors of the panel

    def tick(self, now: float) -> list[Verdict]:
        """Every verdict that holds at `now`, in order of seats. Call about every `tick_s`."""
        self._stretch.tick(now)
        if self._world is None:
            return []
        gone = self._gone()
        self._watch_blindness(now, gone)
        recent = now - self._config.blind_after_s
        seen = [
            track
            for member in self._world.members
            if member.member not in gone
            and (track := self._tracks.get(member.member))
            and track.at >= recent
        ]
        view = View(
            config=self._config,
            size=self._world.size,
            gone=bool(gone),
            seen=seen,
            limit_s=self.limit_s,
            stretch_s=self._stretch.since,
            usual_s=self._tempo.usual_s,
        )
        verdicts = gone | rules.judge(view)
        if verdicts:
            self._accused_at = now
            self._still = None
        else:
            self._watch_tempo(view)
            verdicts = rules.suspicions(view) | self._halted(now)
        if desynced := self._desynced(now):
            # Who waits, waits because of it.
            verdicts = {
                m: v
                for m, v in verdicts.items()
                if not v.suspected and v.fault not in (Fault.HANG_COMM, Fault.STALL, Fault.DESYNC)
            } | desynced
        return sorted(verdicts.values(), key=lambda v: v.seat)

    def _halted(self, now: float) -> dict[MemberId, Verdict]:
        """STOPPED, outside of any step of this world."""
        assert self._world is not None
        return self._halts.suspicions(
            now,
            self._world,
            self._tracks,
            limit_s=NAMED_FLOOR_S,
            recent_s=self._config.blind_after_s,
            stretch_s=self._stretch.since,
            confidence=rules.SUSPECTED,
        )

    def _desynced(self, now: float) -> dict[MemberId, Verdict]:
        """DESYNC, by what members recorded: also in the generation before, which it ended."""
        self._tails = {m: told for m, told in self._tails.items() if now - told[0] <= self._tails_s}
        verdicts: dict[MemberId, Verdict] = {}
        untold = bool(self._members.keys() - self._tails.keys())
        told = set()
        for found in disagreements({m: records for m, (_, records) in self._tails.items()}):
            place = (found.generation, found.group, found.seq)
            told.add(place)
            since, before = self._parted.get(place, (now, found))
            # With one of the majority gone there may be none any more: what was found then holds.
            if before.decided and not found.majority:
                found = before
            self._parted[place] = since, found
        for place, (since, found) in self._parted.items():
            # Newer records that an agent told may not reach back so far.
            if place not in told and now - since > self._tails_s:
                continue
            undecided = untold or (found.awaited and not found.majority)
            if undecided and now - since < self._await_s:
                continue  # with those who have not come, or not told, there may be another majority
            for member in found.slips.keys() & self._members.keys():
                seat = self._members[member].seat
                track = self._tracks.get(member)
                verdicts[member] = Verdict(
                    fault=Fault.DESYNC,
                    member=member,
                    seat=seat,
                    reason=desync.reason(found, member, seat),
                    since_s=found.at_ns / 1e9,
                    evidence=(wording.evidence(track) if track else {})
                    | desync.evidence(found, member),
                    confidence=_confidence(found),
                )
        return verdicts

    def _watch_tempo(self, view: View) -> None:
        """Learn how long the job stands still before it goes on by itself."""
        before, self._still = self._still, None
        if view.gone or not view.complete:
            return
        newest = max((one.row.step for one in view.seen), default=Step(0))
        if self._newest_step is not None:
            self._tempo.advance(min(max(0, newest - self._newest_step), _STEPS_A_LOOK))
        self._newest_step = newest
        moved = max(one.progress_at for one in view.seen)
        if any(one.row.phase in EXEMPT for one in view.seen):
            return  # what ended the gap was a repair
        if before is not None and moved > before.moved + _SAME_S:
            for phase in before.phases:
                self._tempo.note(phase, before.lasted_s)
        excused = any(one.stopped or one.idle_from > one.progress_at for one in view.seen)
        if not excused:
            waited_for = [one for one in view.seen if one.waits_since is None] or view.seen
            self._still = _Still(
                moved=moved,
                lasted_s=min(one.at for one in view.seen) - moved - self._stretch.since(moved),
                phases=frozenset(one.row.phase for one in waited_for),
            )

    def _see(self, seen: RowSeen) -> None:
        member = self._members.get(seen.member)
        if member is None:
            return
        assert self._world is not None
        self._halts.see(seen)
        if seen.ops:
            self._tails[seen.member] = (seen.at, seen.ops)
        if seen.row.generation != self._world.generation or seen.row.member != seen.member:
            return
        track = self._tracks.get(seen.member)
        if track is None:
            track = Track(
                member=seen.member,
                seat=seen.seat,
                node=member.node,
                row=seen.row,
                facts=seen.facts,
                at=seen.at,
            )
            track.see(seen)
            self._tracks[seen.member] = track
            return
        if seen.at < track.at:
            return
        began, allowance = track.step_since, track.row.allowance_ns / 1e9
        step_s = track.see(seen)
        if step_s is None or began is None or track.steps_seen <= self._config.steps_excluded:
            return
        # A step in which somebody was accused, or had leave to stand still, is not a slow step:
        # it would excuse the next hang.
        if self._accused_at < began and allowance < began:
            step_s -= self._stretch.since(began)
            self._slowest_step_s = max(self._slowest_step_s, step_s)

    def _watch_blindness(self, now: float, gone: Mapping[MemberId, Verdict]) -> None:
        assert self._world is not None
        blind: dict[MemberId, float] = {}
        blind_after_s = self._config.blind_after_s
        for member in self._world.members:
            track = self._tracks.get(member.member)
            age_s = now - (track.at if track else self._world_since)
            if age_s > blind_after_s and member.member not in gone:
                blind[member.member] = age_s
        if blind.keys() != self._blind.keys():
            if blind:
                logger.warning(
                    "blind: no usable row of %s members for more than %.1f s, %s among them",
                    len(blind),
                    blind_after_s,
                    sorted(blind)[:_NAMED_MAX],
                )
            else:
                logger.info("no longer blind: every member of the world is seen")
        self._blind = blind

    def _gone(self) -> dict[MemberId, Verdict]:
        """EXITED and OOM."""
        assert self._world is not None
        gone: dict[MemberId, Verdict] = {}
        for m in self._world.members:
            exited = self._exits.get(m.member)
            if exited is not None and self._is_fault(exited):
                gone[m.member] = Verdict(
                    fault=Fault.OOM if exited.out_of_memory else Fault.EXITED,
                    member=m.member,
                    seat=m.seat,
                    reason=wording.exit_reason(exited),
                    since_s=exited.at,
                    evidence={
                        "code": exited.code,
                        "signal": exited.signal,
                        "out_of_memory": exited.out_of_memory,
                        "ours": exited.ours,
                    }
                    | self._last_words(m.member),
                )
        return gone

    def _is_fault(self, exited: Exited) -> bool:
        if exited.code is None and exited.signal is None:
            # Someone else reaped it. A member that had finished is taken at its word.
            last = self._tracks.get(exited.member)
            return last is None or last.row.phase is not Phase.DONE
        return exited.code != 0

    def _last_words(self, member: MemberId) -> dict[str, object]:
        """Where a member that is gone was last seen."""
        one = self._tracks.get(member)
        return {} if one is None else wording.evidence(one)


def _confidence(found: Disagreement) -> float:
    """That a member which differs is the one that is wrong."""
    if found.majority:
        return 1.0
    return rules.SUSPECTED if found.by_history else 1 / found.members
