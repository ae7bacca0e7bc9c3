"""Judge: puts agents' reports before the detector, and its verdicts before the protocol."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from ftkit.core import detour
from ftkit.core.errors import ProtocolError
from ftkit.core.ids import Generation, MemberId, NodeId, Seat
from ftkit.core.verdict import EVICT, Fault, Verdict
from ftkit.core.world import Member, World
from ftkit.detection import signals
from ftkit.detection.clock_offset import ClockOffset
from ftkit.detection.clock_skew import ClockSkew
from ftkit.detection.detector import Detector
from ftkit.detection.flapping import Flapping
from ftkit.detection.inquiry import Inquiry
from ftkit.detection.known_offenders import KnownOffenders
from ftkit.detection.leak import Leaks
from ftkit.detection.levels import Levels, Over
from ftkit.detection.observations import (
    Exited,
    Observation,
    ObserverLate,
    ProcessFacts,
    RowSeen,
    WorldChanged,
)
from ftkit.detection.panel import Panel
from ftkit.detection.reach import Reach
from ftkit.detection.room import Room
from ftkit.detection.row import Awaited, OpRecord, Row
from ftkit.detection.rules import SUSPECTED
from ftkit.detection.self_checks import SelfChecks
from ftkit.detection.slow_io import SlowIo
from ftkit.detection.step_detector import PaceConfig, StepDetector
from ftkit.detection.told import HOLD_S, Told
from ftkit.launch.config import JobConfig
from ftkit.launch.pace import LATE_S
from ftkit.recovery.deadlines import keeps_out, latecomers, restless
from ftkit.recovery.facts import MemberFacts, Stage
from ftkit.recovery.plan import Mode, Plan

logger = logging.getLogger(__name__)

#: What was measured of the steps goes to the event stream so often.
STEPS_EVERY_S = 5.0

#: Of the budget of false alarms, what pace may use. Exits and hangs need none: what they rest on
#: is no matter of chance.
SHARE = 0.5
#: And what comparing the norms of gradients may.
NORM_SHARE = 0.1


class SeatRow(NamedTuple):
    """What an agent tells of one seat."""

    seat: Seat
    row: Row
    facts: ProcessFacts | None
    """None: its process is gone."""
    ops: Sequence[OpRecord] = ()
    awaited: Awaited | None = None


@dataclass(slots=True)
class Findings:
    """What the judge says at one moment."""

    fresh: list[Verdict] = field(default_factory=list)
    """Verdicts not said before: for the event stream."""
    over: list[Over] = field(default_factory=list)
    """Verdicts that hold no longer."""
    evictions: dict[MemberId, str] = field(default_factory=dict)
    """Members to remove, with the reason: levels, said again while they hold."""


def rows_from_json(value: Iterable[Mapping[str, Any]]) -> list[SeatRow]:
    """The rows of an agent's report. What is none is left out: the detector sees the silence."""
    rows: list[SeatRow] = []
    for item in value:
        try:
            rows.append(
                SeatRow(
                    seat=Seat(int(item["seat"])),
                    row=Row.from_json(item["row"]),
                    facts=ProcessFacts.from_json(item["facts"]) if item["facts"] else None,
                    ops=[OpRecord.from_json(r) for r in item.get("ops", ())],
                    awaited=Awaited.from_json(item["awaited"]) if item.get("awaited") else None,
                )
            )
        except (ProtocolError, KeyError, TypeError, ValueError, OverflowError):
            continue
    return rows


class Judge:
    """Feeds the detectors. Owned by the coordinator's thread."""

    def __init__(self, config: JobConfig) -> None:
        self._times = config.times
        self._detector = Detector(config.detection)
        self._pace = StepDetector(
            PaceConfig(
                alarms_per_day=SHARE * config.alarms_per_day,
                norm_alarms_per_day=NORM_SHARE * config.alarms_per_day,
                report_s=config.times.report_s,
            )
        )
        # What ranks tell comes with the next report of their agent.
        told = Told(hold_s=max(HOLD_S, 2 * config.times.report_s))
        around = (KnownOffenders(), Leaks(), Room(), SlowIo(), ClockSkew(), Flapping())
        self._panel = Panel([self._detector, self._pace, told, *around])
        self._steps_told_at = 0.0
        # A drill's relay stands between seats of one node, too.
        self.inquiry = Inquiry(between_seats=detour.VARIABLE in config.env)
        self.checks = SelfChecks()
        self.reach = Reach(config.times.node_s)
        self._levels = Levels(linger_s=config.times.stall_s / 6)
        self._plain: set[MemberId] = set()
        self._waiting: set[MemberId] = set()
        """Who stood in a collective when it was last seen."""
        self._gone_nodes: dict[NodeId, float] = {}
        self._clocks: dict[NodeId, ClockOffset] = {}
        self._plain_world: World | None = None
        self._world: World | None = None
        self._waited_since = 0.0
        """When the newest world was to be entered, with every node of it in reach."""
        self._stood_since: float | None = None
        """Since when no world trains, where one did."""

    def observer_woke(self, *, late_by_s: float, at: float) -> None:
        """The coordinator's own clock tick came late: it may not accuse others of lateness."""
        if late_by_s > LATE_S:
            self._ingest(ObserverLate(by_s=late_by_s))

    @property
    def blind(self) -> Mapping[MemberId, float]:
        """Members of whom nothing is known, and since how many seconds: no verdict covers them."""
        return self._detector.blind

    @property
    def busy(self) -> frozenset[NodeId]:
        """Nodes whose transfers look slow, and that are too busy for a network to be blamed."""
        return self._pace.transfers.blind

    def take(self, observation: Observation) -> None:
        """Something else was seen, at a time on this clock."""
        self._ingest(observation)

    def node_gone(self, node: NodeId, at: float) -> None:
        """The connection to a node's agent broke. What it held may be lost: nobody knows yet."""
        self._gone_nodes.setdefault(node, at)
        self._clocks.pop(node, None)  # who comes next may have started its host again

    def node_back(self, node: NodeId, at: float) -> None:
        """The same agent is there again: only the connection had broken."""
        if self._gone_nodes.pop(node, None) is not None:
            self._waited_since = max(self._waited_since, at)

    def take_plan(self, plan: Plan, *, at: float) -> None:
        """A plan was made: the world may have changed, the job may be halting."""
        if plan.world is not None and plan.world != self._world:
            known = self._world.member_ids if self._world is not None else frozenset()
            kept = {m.node for m in plan.world.members if m.member in known}
            # Who is new in it was heard of. Those that were in the last may be out of reach still.
            self._gone_nodes = {n: t for n, t in self._gone_nodes.items() if n in kept}
            self._world, self._waited_since, self._stood_since = plan.world, at, None
            self._ingest(WorldChanged(world=plan.world, at=at))
        if plan.mode is Mode.RUNNING or plan.world is None:
            self._stood_since = None
        elif self._stood_since is None:
            self._stood_since = at

    def take_report(
        self,
        node: NodeId,
        rows: Iterable[SeatRow],
        members: Sequence[MemberFacts],
        *,
        measured: Iterable[object] = (),
        late_s: float = 0.0,
        sent: float,
        at: float,
    ) -> None:
        """An agent reported its rows and its members' ends.

        Args:
          node: whose agent.
          rows: seats' rows with what the kernel says of their processes.
          members: the members it knows.
          measured: signals as JSON (`detection.signals`); what is none is passed over.
          late_s: by how much its looks at the rows were late since the report before.
          sent: when it reported, on its clock, which is that of the rows.
          at: when that arrived here, on ours.
        """
        # Rows carry the agent's clock. No node is taken to share this host: where an engine
        # places the coordinator is its affair.
        offset_ns = int(self._clocks.setdefault(node, ClockOffset()).note(sent=sent, at=at) * 1e9)
        if late_s > LATE_S:
            self._ingest(ObserverLate(by_s=late_s, who=node))
        for value in measured:
            try:
                signal = signals.from_json(value, offset_s=offset_ns / 1e9)
                if isinstance(signal, signals.CommSeen) and self._plain_world is not None:
                    # As with rows: a script without a session knows of no generations.
                    signal = replace(signal, generation=self._plain_world.generation)
                self._ingest(signal)
            except ProtocolError as error:
                logger.warning("node %s sent no signal: %s", node, error)
        seats = {m.seat for m in members}
        for told in rows:
            if told.seat in seats:
                row = told.row.shifted(offset_ns)
                (self._waiting.add if row.t_enter_ns else self._waiting.discard)(row.member)
                if row.plain:
                    self._plain.add(row.member)
                    if self._plain_world is not None:
                        row = replace(row, generation=self._plain_world.generation)
                self._ingest(
                    RowSeen(
                        member=row.member,
                        seat=told.seat,
                        row=row,
                        facts=told.facts,
                        at=at,
                        ops=told.ops,
                        awaited=told.awaited,
                    )
                )
        for member in members:
            code = member.exit_code
            if member.stage is Stage.DEAD:
                self._ingest(
                    Exited(
                        member=member.member,
                        seat=member.seat,
                        code=code if code is not None and code >= 0 else None,
                        signal=-code if code is not None and code < 0 else None,
                        at=at,
                        out_of_memory=member.out_of_memory,
                        ours=member.ours,
                    )
                )

    def steps(self, now: float, *, rest: bool = False) -> list[dict[str, object]]:
        """Fields of the "steps" events that are due (`detection.ledger`); with `rest`, of all."""
        due = rest or now - self._steps_told_at > STEPS_EVERY_S
        if due:
            self._steps_told_at = now
        if rest:
            self._pace.flush()
        return self._pace.ledger.take(rest=due)

    def _ingest(self, observation: Observation) -> None:
        self._panel.ingest(observation)
        if isinstance(observation, RowSeen):
            return  # most of what comes, and of no interest to the others
        self.inquiry.ingest(observation)
        if isinstance(observation, signals.ReachSeen):
            self.reach.take(observation)
        self.checks.ingest(observation)

    def verdicts(
        self,
        plan: Plan,
        members: Mapping[MemberId, MemberFacts],
        now: float,
        *,
        lost: Mapping[NodeId, float] | None = None,
    ) -> Findings:
        """What is wrong now, and who has to go for it.

        Args:
          plan: the newest.
          members: all that are known.
          now: the time.
          lost: nodes that are taken for lost, and for how many seconds nothing has come of them.
        """
        findings = Findings()
        if plan.mode is Mode.ENDED:
            findings.over = self._levels.close()
            return findings
        if plan.world is None:
            self._watch_plain(plan, now)
        said = self.checks.tick(now, self.inquiry.tick(now, self._panel.tick(now)))
        said += self._lost(
            plan.world or self._plain_world,
            {v.member for v in said if v.fault in EVICT},
            lost or {},
            now,
        )
        findings.fresh, findings.over = self._levels.take(said, now)
        for verdict in said:
            # Of a script without a session none can be replaced: it is named, and that is all.
            # What follows from a lost node, the protocol says.
            goes = verdict.evicts and verdict.fault is not Fault.NODE_LOST
            if goes and self._plain_world is None:
                findings.evictions[verdict.member] = verdict.reason
        overdue = self._overdue(plan, members, now)
        if plan.mode is Mode.RUNNING and plan.world and any(v.fault is Fault.STALL for v in said):
            overdue |= keeps_out(plan.world, members.values())
        findings.evictions = overdue | findings.evictions
        return findings

    def _overdue(
        self, plan: Plan, members: Mapping[MemberId, MemberFacts], now: float
    ) -> dict[MemberId, str]:
        """Whom the detector does not judge, for no collective tells of them (`deadlines`)."""
        limit_s = self._detector.limit_s
        if plan.mode is Mode.RUNNING and plan.world is not None:
            return latecomers(
                plan.world,
                members.values(),
                waited_s=now - self._waited_since,
                limit_s=limit_s,
                away=self._gone_nodes,
                waiting=self._waiting,
            )
        if plan.mode is Mode.RUNNING or self._stood_since is None:
            return {}
        return restless(
            plan,
            members.values(),
            halting_s=now - self._stood_since,
            standing_s=now - max(self._stood_since, self._waited_since),
            halt_s=self._times.halt_s,
            limit_s=limit_s,
            away=self._gone_nodes,
        )

    def _lost(
        self,
        world: World | None,
        named: set[MemberId],
        lost: Mapping[NodeId, float],
        now: float,
    ) -> list[Verdict]:
        """NODE_LOST: suspected once the agent hung up, certain once it is taken for lost."""
        away = self._gone_nodes.keys() | lost.keys()
        if world is None or all(m.node in away for m in world.members):
            return []  # we hear nobody: that is our own deafness
        found = []
        for m in world.members:
            if m.node not in away or m.member in named:
                continue
            silent_s = lost.get(m.node)
            if silent_s is None:
                what = f"the connection to the agent of node {m.node} broke"
            elif self.reach.is_proved(m.node, now):
                what = f"the agent of node {m.node} is dead, for its machine refuses connections"
            else:
                what = f"nothing was heard of node {m.node} for {silent_s:.1f} s"
            found.append(
                Verdict(
                    fault=Fault.NODE_LOST,
                    member=m.member,
                    seat=m.seat,
                    reason=f"{what}, and seat {m.seat} (member {m.member}) is on it",
                    since_s=self._gone_nodes[m.node] if silent_s is None else now - silent_s,
                    evidence={"node": m.node},
                    confidence=SUSPECTED if silent_s is None else 1.0,
                    suspected=silent_s is None,
                )
            )
        return found

    def _watch_plain(self, plan: Plan, now: float) -> None:
        """Give the detectors a world of those that run a script without a session, all at once."""
        here = {a.member: a for a in plan.seats}
        known = self._plain_world
        if len(here) < 2 or not here.keys() <= self._plain:
            return
        if known is not None and known.member_ids == here.keys():
            return
        generation = Generation(known.generation + 1 if known else 1)
        members = [
            Member(member=m, seat=a.seat, node=a.node, host="", port=0) for m, a in here.items()
        ]
        self._plain_world = World.of(generation, members)
        self._ingest(WorldChanged(world=self._plain_world, at=now))
