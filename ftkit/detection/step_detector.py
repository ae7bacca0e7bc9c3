"""StepDetector: from finished steps to verdicts about pace. A member of the panel.

It lines up what members say of the same step (`aligned`) and puts it before those who judge:
`slow` (which member, against its peers or its past), `imbalance`, `stalls`, `slow_reads` and
`norms`; and what it is told of collectives before `slow_transfers`. Nothing that it says evicts anybody.
"""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import ClassVar, Final

from ftkit.core.ids import Generation, MemberId
from ftkit.core.verdict import Fault, Verdict
from ftkit.detection.aligned import Aligned, StepOf
from ftkit.detection.cusum import median
from ftkit.detection.imbalance import Imbalance, Unevenness
from ftkit.detection.lateness import Lateness
from ftkit.detection.ledger import WORK, Ledger
from ftkit.detection.norms import Norms
from ftkit.detection.observations import Observation, WorldChanged
from ftkit.detection.peers import log_or_none
from ftkit.detection.signals import CommSeen, NodeSeen, StepSeen
from ftkit.detection.slow import Finding, Slowness
from ftkit.detection.slow_reads import SlowReads
from ftkit.detection.slow_transfers import SlowTransfers
from ftkit.detection.stalls import Stalled, Stalls

DAY_S: Final = 86400.0

#: A finding stands until the evidence has fallen to this share of what it took.
_HOLDS: Final = 0.5

#: A day has few long steps: so many of the job's lie between two false alarms, however long they are.
_STEPS_BETWEEN: Final = 10_000

#: The share of the time for which a member must have had a core for its work to be compared.
_HEARD: Final = 0.25

#: What starvation must explain of what a member is behind by, for the host to be at fault.
_EXPLAINS: Final = 0.5

#: Who waits for a core for this share of its work or more shares cores; and then what shares a core's
#: units and caches with it may make its own work longer by so much, without its being at fault.
_SHARED, _SHARED_FACTOR = 0.05, 4 / 3

#: Who was found slow is so until it takes no longer than this: estimates come down a little.
_SLOW_UNTIL: Final = 1.25


@dataclass(frozen=True, slots=True, kw_only=True)
class PaceConfig:
    """What is looked for, and at what price."""

    effect: float = 0.10
    """The smallest slowdown that is to be found, as a fraction of the work of a step."""

    alarms_per_day: float = 0.5
    """False alarms about slow members that the whole job may cost, whatever its size."""

    norm_alarms_per_day: float = 0.1
    """The same about members whose gradients have changed."""

    steps_excluded: int = 2
    """Steps of each member in a generation that do not count: they compile and warm up."""

    report_s: float = 0.5
    """Seconds between two reports of an agent."""

    def __post_init__(self) -> None:
        if not 0.01 <= self.effect <= 1.0:
            raise ValueError(
                f"effect is {self.effect}, must be in 0.01..1: smaller ones drown in any noise, "
                "larger ones are found as well with 1"
            )
        for name in ("alarms_per_day", "norm_alarms_per_day"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(
                    f"{name} is {value}, must be above 0: without any there can be no detection"
                )
        if self.steps_excluded < 0:
            raise ValueError(f"steps_excluded is {self.steps_excluded}, must not be negative")


@dataclass(slots=True)
class _Standing:
    """A finding that stands."""

    fault: Fault
    finding: Finding
    phase: str
    seen: StepSeen
    judge: Slowness
    """Whose finding it is."""
    why: str = ""


@dataclass(slots=True)
class _Recent:
    """The last steps of one member."""

    steps: deque[StepSeen] = field(default_factory=lambda: deque(maxlen=16))
    generation: Generation = Generation(-1)
    played: int = 0


class StepDetector:
    """Owned by one thread, which ingests and ticks. Costs about 20 µs a member and step."""

    HEARS: ClassVar[frozenset[type]] = frozenset({CommSeen, NodeSeen, StepSeen, WorldChanged})

    def __init__(self, config: PaceConfig) -> None:
        self.config = config
        self._aligned = Aligned(config.report_s)
        # Half of the budget each: work as the member did it, and as the wall clock saw it.
        self._own = Slowness(effect=config.effect)
        self._wall = Slowness(effect=config.effect)
        self._imbalance = Imbalance(effect=config.effect)
        self._stalls = Stalls()
        self._reads = SlowReads()
        self._norms = Norms(alarms_per_day=config.norm_alarms_per_day)
        self._lateness = Lateness()
        self.transfers = SlowTransfers()
        """What the collectives themselves take, of every group."""
        self.ledger = Ledger()
        """Every step that was judged, for whoever takes it from there."""
        self._recent: dict[MemberId, _Recent] = {}
        self._standing: dict[MemberId, _Standing] = {}
        self._uneven: list[Unevenness] = []
        self._stalled: list[Stalled] = []
        self._durations: deque[float] = deque(maxlen=64)
        self._members = 0
        self._at = 0.0
        self.steps = 0
        """Steps judged so far."""

    def ingest(self, observation: Observation) -> None:
        """Take in finished steps, collectives and changes of the world."""
        self.transfers.ingest(observation)
        match observation:
            case StepSeen():
                self._aligned.add(observation)
                self._judge_ready()
            case CommSeen():
                for joined in self._lateness.ingest(observation):
                    self.ledger.join(joined)
                    self.transfers.take(joined, at=observation.at)
            case WorldChanged(world=world):
                self._judge_ready(rest=True)
                self._aligned.change(world)
                self._reads.change(world)
                self._forget(frozenset(m.member for m in world.members))
            case _:
                pass

    def flush(self) -> None:
        """Judge what waits for members that will not speak any more: at the end of a trace."""
        self._judge_ready(rest=True)

    def tick(self, now: float) -> list[Verdict]:
        """What stands as of the last whole step, which does not age, and of the last collectives."""
        verdicts = self.transfers.tick(now) + self._norms.tick() + self._reads.tick()
        verdicts += [self._slow_verdict(m, s) for m, s in self._standing.items()]
        verdicts += [self._stall_verdict(s) for s in self._stalled]
        verdicts += [self._uneven_verdict(u) for u in self._uneven]
        return verdicts

    def _judge_ready(self, *, rest: bool = False) -> None:
        for step in self._aligned.take(rest=rest):
            self._judge(step)

    def _judge(self, step: StepOf) -> None:
        self.steps += 1
        self.ledger.add(step)
        self._at = max(one.at for one in step.values())
        warm = {m: one for m, one in step.items() if self._warm(m, one)}
        if not warm:
            return
        self._members = len(step)
        spent = [sum(one.seconds.values()) + one.waited_s for one in warm.values()]
        self._durations.append(median(spent))
        step_s = max(1e-6, median(self._durations))
        self._stalled = self._stalls.step(warm.values(), step_s=step_s)

        own = {m: v for m, one in warm.items() if (v := log_or_none(work_of(one))) is not None}
        wall = {m: v for m in own if (v := log_or_none(work_of(warm[m], starved=True))) is not None}
        # Who had a core for next to none of the time says nothing about itself.
        own = {m: v for m, v in own.items() if v >= wall[m] + math.log(_HEARD)}
        keys = {m: (one.role, one.slots) for m, one in warm.items()}
        self._reads.step(warm, step_s=step_s, at=self._at)
        a_day = len(step) * DAY_S / step_s
        self._norms.step(warm, steps_a_day=a_day, at=self._at)
        between = 2 * max(_STEPS_BETWEEN * len(step), a_day / self.config.alarms_per_day)
        slow = {f.member: f for f in self._own.step(own, keys, at=self._at, steps_between=between)}
        late = {
            f.member: f for f in self._wall.step(wall, keys, at=self._at, steps_between=between)
        }
        self._stand(slow, late, warm)
        self._uneven = self._imbalance.step(
            {m: math.exp(own[m]) * max(1, warm[m].slots) for m in own},
            {m: warm[m].role for m in own},
            kinds=self._own.kinds,
            slow=self._standing.keys(),
        )

    def _warm(self, member: MemberId, seen: StepSeen) -> bool:
        recent = self._recent.setdefault(member, _Recent())
        if recent.generation != seen.generation:
            recent.generation, recent.played = seen.generation, 0
        recent.played += 1
        if recent.played <= self.config.steps_excluded:
            return False
        recent.steps.append(seen)
        return True

    def _stand(
        self,
        slow: Mapping[MemberId, Finding],
        late: Mapping[MemberId, Finding],
        warm: StepOf,
    ) -> None:
        """Bring the findings that stand up to date."""
        for member, standing in list(self._standing.items()):
            if member in warm and standing.judge.suspicion(member) < _HOLDS:
                del self._standing[member]
        for member, finding in late.items():
            # Who was found slow is so until that no longer holds, on a busy host as well.
            known = self._standing.get(member)
            if member in slow or (known is not None and known.judge is self._own):
                continue
            starved_s, work_s = self._starved(member, finding, warm)
            behind_s = work_s * (1 - 1 / finding.factor)
            if starved_s >= _EXPLAINS * behind_s > 0:
                why = ", because it waits for a core of its host"
                self._stand_for(Fault.STARVED, finding, warm, self._wall, why)
        for member, finding in slow.items():
            starved_s, work_s = self._starved(member, finding, warm)
            known = self._standing.get(member)
            accused = known is not None and known.fault is Fault.SLOW
            excused = _SLOW_UNTIL if accused else _SHARED_FACTOR
            if starved_s >= _SHARED * work_s > 0 and finding.factor <= excused:
                share = 100 * starved_s / work_s
                why = f", on cores that it shares: it waits for one {share:.0f} % of that time"
                self._stand_for(Fault.STARVED, finding, warm, self._own, why)
            else:
                self._stand_for(Fault.SLOW, finding, warm, self._own)

    def _stand_for(
        self, fault: Fault, finding: Finding, warm: StepOf, judge: Slowness, why: str = ""
    ) -> None:
        phase, seen = self._phase(finding.member, warm), warm[finding.member]
        self._standing[finding.member] = _Standing(fault, finding, phase, seen, judge, why)

    def _starved(self, member: MemberId, finding: Finding, warm: StepOf) -> tuple[float, float]:
        """For how long it waited for a core in a step since then, and took for its work in all."""
        steps = [one for one in self._recent[member].steps if one.at >= finding.since]
        steps = steps or [warm[member]]
        starved = median([one.starved_s for one in steps])
        work = median([sum(one.seconds.get(p, 0.0) for p in WORK) for one in steps])
        return starved, work

    def _phase(self, member: MemberId, warm: StepOf) -> str:
        """The phase of work in which it loses most against its peers, or against its own past."""
        mine = warm[member]
        peers = [
            one
            for m, one in warm.items()
            if m != member and (one.role, one.slots) == (mine.role, mine.slots)
        ]
        before = [*self._recent[member].steps][:4] if len(peers) < 2 else []
        against = before or peers
        phases = [p for p in WORK if p in mine.seconds]
        if not phases or not against:
            return phases[0] if phases else WORK[0]
        return max(
            phases,
            key=lambda p: mine.seconds[p] - median([o.seconds.get(p, 0.0) for o in against]),
        )

    def _slow_verdict(self, member: MemberId, standing: _Standing) -> Verdict:
        finding, seen = standing.finding, standing.seen
        more = 100 * (finding.factor - 1)
        if finding.against == "peers":
            whom = f"{finding.others} members that do the same work"
        else:
            whom = "it used to, beyond what changed for the others"
        role = f" of {seen.role}" if seen.role else ""
        return Verdict(
            fault=standing.fault,
            member=member,
            seat=seen.seat,
            reason=(
                f"seat {seen.seat} (member {member}){role} takes {more:.0f} % longer in "
                f"{standing.phase} than {whom}, for {finding.steps} steps{standing.why}"
            ),
            since_s=finding.since,
            evidence={
                "factor": round(finding.factor, 3),
                "phase": standing.phase,
                "steps": finding.steps,
                "step": int(seen.step),
                "against": finding.against,
                "others": finding.others,
                "role": seen.role,
                "place": seen.place,
                "slots": seen.slots,
                "threshold": {
                    name: round(value, 5) for name, value in asdict(finding.threshold).items()
                },
                "alarms_per_day": self.config.alarms_per_day,
                "ranks": self._members,
            },
            confidence=_confidence(finding),
        )

    def _stall_verdict(self, stalled: Stalled) -> Verdict:
        seen = self._recent[stalled.member].steps[-1]
        what = "its loader" if stalled.fault is Fault.DATA_STALL else "Python's garbage collector"
        often = "" if stalled.times == 1 else f"; it is the last of {stalled.times} close together"
        return Verdict(
            fault=stalled.fault,
            member=stalled.member,
            seat=seen.seat,
            reason=(
                f"seat {seen.seat} (member {stalled.member}) waited {stalled.seconds:.2f} s for "
                f"{what} in step {stalled.step}, usually {stalled.usual_s:.2f} s{often}"
            ),
            since_s=stalled.since,
            evidence={
                "seconds": round(stalled.seconds, 4),
                "usual_s": round(stalled.usual_s, 4),
                "step": stalled.step,
                "times": stalled.times,
            },
            confidence=0.9,
        )

    def _uneven_verdict(self, uneven: Unevenness) -> Verdict:
        seats = sorted(self._recent[m].steps[-1].seat for m in uneven.members)
        first = min(uneven.members, key=lambda m: self._recent[m].steps[-1].seat)
        where = f" of {uneven.role}" if uneven.role else ""
        what = {
            "rotating": f"in {100 * uneven.share:.0f} % of the steps the last of the "
            f"{len(seats)} members{where} takes {uneven.factor:.2f} times as long as most, and "
            "each time it is another one",
            "role": f"the members{where} take {uneven.factor:.2f} times as long as the other roles",
            "kinds": f"the {len(seats)} members{where} are of two kinds, one of which takes "
            f"{uneven.factor:.2f} times as long",
        }[uneven.kind]
        return Verdict(
            fault=Fault.IMBALANCE,
            member=first,
            seat=seats[0],
            reason=f"{what}: the work is uneven and nobody is at fault",
            since_s=self._at,
            evidence={
                "kind": uneven.kind,
                "role": uneven.role,
                "factor": round(uneven.factor, 3),
                "share": round(uneven.share, 3),
                "seats": seats[:64],
            },
            confidence=0.8,
        )

    def _forget(self, keep: frozenset[MemberId]) -> None:
        for judge in (self._own, self._wall, self._stalls, self._norms):
            judge.forget(keep)
        self._recent = {m: r for m, r in self._recent.items() if m in keep}
        self._standing = {m: s for m, s in self._standing.items() if m in keep}
        self._stalled = [s for s in self._stalled if s.member in keep]
        self._uneven = [u for u in self._uneven if u.members <= keep]


def work_of(seen: StepSeen, *, starved: bool = False) -> float:
    """Seconds of work for one slot: collections left out, and time without a core, unless wanted."""
    spent = sum(seen.seconds.get(phase, 0.0) for phase in WORK)
    spent -= seen.gc_s + (0.0 if starved else seen.starved_s)
    return spent / max(1, seen.slots)


def _confidence(finding: Finding) -> float:
    if finding.against == "past":
        return 0.7
    return 0.95 if finding.others >= 4 else 0.85
