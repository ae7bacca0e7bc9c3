"""SimAgent and SimCoordinator: the drivers around the pure protocol, as the simulator has them.

An agent takes with it all it knew and all it held, the seats' arenas among it: the next one
on its node begins with nothing but another `boot`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ftkit.core.ids import Boot, Generation, MemberId, NodeId, Seat, Step, Term
from ftkit.core.inventory import Copy, Inventory
from ftkit.launch.decision_costs import DecisionCosts
from ftkit.launch.judge import Judge
from ftkit.launch.pace import Rest
from ftkit.launch.replacement_wait import ReplacementWait
from ftkit.launch.simulator_glance import Glance
from ftkit.launch.simulator_rank import SimRank
from ftkit.recovery.facts import JobFacts, MemberFacts, Stage
from ftkit.recovery.plan import Mode, Plan, adopt, first_plan
from ftkit.recovery.protocol import advance, gone

if TYPE_CHECKING:
    from ftkit.launch.simulator import Simulation

#: What a coordinator's look costs for each rank, as measured (`benchmarks.scale`). After a look it
#: rests (`pace.Rest`), so a large job is looked at less often.
LOOK_S = 3e-5


class SimAgent:
    """The agent of one node: spawns and kills, relays standings up and plans down."""

    def __init__(self, sim: "Simulation", node: NodeId, boot: Boot) -> None:
        self.sim, self.node, self.boot = sim, node, boot
        self.alive = True
        self.ranks: dict[Seat, SimRank] = {}
        self.plan: Plan | None = None
        self._spawned: set[MemberId] = set()
        self._facts: dict[MemberId, MemberFacts] = {}
        self._dirty = False
        sim.after(0.0, self._beat)

    def _beat(self) -> None:
        if self.alive:
            if self.sim.sharded:
                self._look_at_steps()
            self._flush(True)
            self.sim.after(self.sim.times.report_s, self._beat)

    def _look_at_steps(self) -> None:
        """Their rows say what step they play: what a job of shards has lost is told by it."""
        for rank in self.ranks.values():
            known = self._facts.get(rank.member)
            if known is not None and known.at_step != rank.at_step:
                self._facts[rank.member] = replace(known, at_step=rank.at_step)

    def told(self, facts: MemberFacts) -> None:
        """A rank says where it stands."""
        self.sim.after(0.001, self._take, facts)

    def _take(self, facts: MemberFacts) -> None:
        known = self._facts.get(facts.member)
        if known is None or known.stage not in (Stage.DEAD, Stage.FINISHED):
            self._facts[facts.member] = facts
            self._changed()

    def greeted(self, rank: SimRank) -> None:
        """A rank says hello: it gets the plan."""
        if self.plan is not None:
            self.sim.after(0.001, rank.do, rank.take_plan, self.plan)

    def saw_exit(self, rank: SimRank, code: int | None) -> None:
        """A rank's process is gone."""
        if not self.alive:
            return
        told = self._facts.get(rank.member, rank.facts())
        stage = Stage.FINISHED if code == 0 else Stage.DEAD
        self._facts[rank.member] = _ended(told, stage, code, rank.at_step)
        if self.ranks.get(rank.seat) is rank:
            del self.ranks[rank.seat]
        self._carry_out()
        self._changed()

    def take_plan(self, plan: Plan) -> None:
        """A plan arrives from a coordinator; an older one is ignored."""
        if not self.alive or self.sim.is_deaf(self.node):
            return
        if self.plan is None or plan.order > self.plan.order:
            self.plan = plan
            for rank in list(self.ranks.values()):
                self.sim.after(0.001, rank.do, rank.take_plan, plan)
            self._carry_out()

    def _carry_out(self) -> None:
        if not self.alive or self.plan is None or self.plan.mode is Mode.ENDED:
            return
        for rank in list(self.ranks.values()):
            if rank.member in self.plan.evicted or self.plan.seat_of(rank.member) is None:
                # Those that can leave by themselves get a moment for it.
                self.sim.after(0.1, self.sim.die, rank, -9)
        for seat in self.sim.assigned(self.plan, self.boot):
            if seat.seat in self.ranks or seat.member in self._spawned:
                continue
            self._spawned.add(seat.member)
            rank = self.ranks[seat.seat] = self.sim.spawn(seat.member, seat.seat, self.node)
            self._facts[seat.member] = rank.facts()
            if not self._passes_spawn(rank):
                return
        if self.sim.forgetful:
            # Nobody promised to remember members that have no seat any more.
            here = {r.member for r in self.ranks.values()}
            for member in [m for m in self._facts if self.plan.seat_of(m) is None]:
                if member not in here:
                    del self._facts[member]
        self._changed()

    def _passes_spawn(self, rank: SimRank) -> bool:
        """Pass the point after a spawn; False when a fault there took this agent."""
        self.sim.injector.point("spawned", rank)
        return self.alive

    def _changed(self) -> None:
        if not self._dirty:
            self._dirty = True
            self.sim.after(0.002, self._flush, False)

    def _flush(self, beat: bool) -> None:
        if not beat:
            self._dirty = False
        if self.alive and not self.sim.is_deaf(self.node):
            self.sim.to_coordinator(self, False, rows=beat)

    def report(self, *, rows: bool) -> "Report":
        """Everything this agent knows, at this moment; `rows` once a tick, as they are judged."""
        # A torn answer to "where do you stand" would be a lie; what a rank says of itself is
        # whole, so the agent relays it untouched.
        return Report(
            members=dict(self._facts),
            snapshots=self.sim.arenas.steps(self.node),
            copies=self.sim.shards.copies(self.node) if self.sim.sharded else (),
            plan=self.plan,
            boot=self.boot,
            rows=[r.glance() for r in self.ranks.values() if r.alive] if rows else [],
        )


@dataclass(frozen=True, slots=True)
class Report:
    """One node's facts."""

    members: Mapping[MemberId, MemberFacts]
    snapshots: frozenset[Step]
    copies: tuple[Copy, ...]
    plan: Plan | None
    boot: Boot
    rows: Sequence[Glance]


class SimCoordinator:
    """One coordinator: waits for every living agent, adopts, then advances the plan."""

    def __init__(self, sim: "Simulation", term: Term) -> None:
        self.sim, self.term = sim, term
        self._judge = Judge(sim.config)
        self._costs = DecisionCosts(sim.config.seats)
        self._waits = ReplacementWait()
        self._evictions: Mapping[MemberId, str] = {}
        self.alive = True
        self.plan: Plan | None = None
        self._reports: dict[NodeId, Report] = {}
        self._known: dict[MemberId, MemberFacts] = {}
        self._rest = Rest(sim.times.tick_s)
        self._judging = False
        self._rows: dict[NodeId, tuple[Sequence[Glance], float]] = {}
        self._heard: dict[NodeId, float] = {}
        self._born_s = sim.now

    def start(self) -> None:
        """Ask every agent for its report, and begin to tick."""
        self._tick()

    def _tick(self) -> None:
        if not self.alive:
            return
        if self.plan is None:
            # A hello may be lost to a deaf node, so it is asked for until it comes.
            for agent in self.sim.agents.values():
                if agent.node not in self._reports:
                    self.sim.to_coordinator(agent, True)
        # Once a tick, and not at every report: the simulation is fast enough so.
        self._judging = True
        self._look()
        self.sim.after(self.sim.times.tick_s, self._tick)

    def _look(self) -> None:
        """Judge and advance, or do so after a rest."""
        now, owed = self.sim.now, self._rest.owed
        if not self.alive:
            return
        if not self._rest.due(now):
            if not owed:
                self.sim.after(self._rest.until - now, self._look_again)
            return
        if self.plan is not None and self._judging:
            self._judging = False
            self._evictions = self._judged(self.plan)
        self._advance()
        self._rest.looked(now, now + LOOK_S * self.sim.size)

    def _look_again(self) -> None:
        self._rest.owed = False
        self._look()

    def hear(self, agent: SimAgent, report: Report) -> None:
        """An agent's report arrives."""
        if not self.alive:
            return
        self._reports[agent.node] = report
        self._heard[agent.node] = self.sim.now
        self._known.update(report.members)
        if report.rows:
            self._rows[agent.node] = report.rows, self.sim.now
        self._look()
        order = report.plan.order if report.plan else (-1, -1)
        if self.plan is not None and order < self.plan.order:
            self.sim.to_agent(agent.node, self.plan)

    def _advance(self) -> None:
        if self.plan is None and not self._take_over():
            return
        assert self.plan is not None, "taken over"
        before = self.plan
        if before.mode is Mode.ENDED:
            return
        facts = self._facts()
        wait, waits = self._waits.look(before, facts, self._costs, self.sim.now)
        for decision in waits:
            self.sim.note(decision.action, None, decision.reason)
        facts = replace(facts, wait=wait)
        after, decisions = advance(before, facts, self.sim.budget)
        self._costs.look(before, facts, self.sim.now)
        if after is before:
            return
        decisions = self._costs.explain(
            before, after, facts, decisions, now=self.sim.now, arena=facts.snapshots
        )
        for decision in decisions:
            self.sim.note(decision.action, None, f"{decision.reason} {decision.fields}")
        self.sim.checker.revised(before, after, facts, self.sim.ranks)
        if self.sim.sharded and (after.stop is not None or after.resumed > before.resumed):
            self._check_shards(before, after, facts)
        self.plan = after
        self._judge.take_plan(after, at=self.sim.now)
        for node in self.sim.agents:
            self.sim.to_agent(node, after)
        if after.stop is not None:
            self.sim.ended = after.stop
            # Whoever asks again, or takes over, finds it ended.
            for plan in (after, adopt([after], term=Term(self.term + 1))):
                self.sim.checker.stays_ended(advance(plan, facts, self.sim.budget)[0])

    def _check_shards(self, before: Plan, after: Plan, facts: JobFacts) -> None:
        agents = {n: a for n, a in self.sim.agents.items() if n not in facts.nodes_lost}
        if any(not a.alive or a.boot != facts.boots.get(n) for n, a in agents.items()):
            return  # nobody can have heard yet of what was lost this moment
        whole = self.sim.shards.inventory(agents).complete()
        last = [w for w in (before.world, before.joining) if w is not None]
        writing = [
            m
            for m in frozenset().union(*(w.member_ids for w in last))
            if self.sim.ranks[m].writes_shards and not gone(after, facts, m)
        ]
        intact = not self.sim.shards.lost
        self.sim.checker.shards_kept(before, after, whole, writing, intact=intact)

    def _take_over(self) -> bool:
        for node, agent in self.sim.agents.items():
            if node not in self._reports and agent.alive:
                return False
        if not self._reports:
            return False
        copies = [r.plan for r in self._reports.values() if r.plan is not None]
        if copies:
            self.plan = adopt(copies, term=self.term)
        else:
            self.sim.checker.begins_anew()
            self.plan = first_plan(self.sim.nodes, self.sim.seats_per_node, term=self.term)
        self._judge.take_plan(self.plan, at=self.sim.now)
        self.sim.note("adopt", None, f"{len(copies)} copies, now {self.plan.order}")
        for node in self.sim.agents:
            self.sim.to_agent(node, self.plan)
        return True

    def _facts(self) -> JobFacts:
        now = self.sim.now
        lost = frozenset(
            n
            for n in self.sim.agents
            if now - self._heard.get(n, self._born_s) > self.sim.times.node_s
        )
        reachable = [r for n, r in self._reports.items() if n not in lost]
        snapshots, awaited = frozenset(s for r in reachable for s in r.snapshots), ""
        # What is whole is asked where a world may be formed from it: to know it takes a while.
        if self.sim.sharded and self.plan is not None and self.plan.mode is not Mode.RUNNING:
            newest = Inventory(
                copies=tuple(c for r in reachable for c in r.copies)
            ).newest_complete()
            snapshots = frozenset({newest[1]} if newest else ())
            if self.plan.mode is Mode.FORMING and self.plan.world is not None:
                awaited = self.sim.shards.awaited(newest)
        return JobFacts(
            awaited=awaited,
            members=self._known,
            snapshots=snapshots,
            evictions=self._evictions,
            nodes_lost=lost,
            boots={n: r.boot for n, r in self._reports.items()},
        )

    def _judged(self, plan: Plan) -> Mapping[MemberId, str]:
        """Who has to go, as the real judge and detector see it: by what came last."""
        for node, report in self._reports.items():
            rows, at = self._rows.pop(node, ((), self._heard[node]))
            seen = [glance.row() for glance in rows]
            self._judge.take_report(node, seen, list(report.members.values()), sent=at, at=at)
        findings = self._judge.verdicts(plan, self._known, self.sim.now)
        for verdict in findings.fresh:
            if verdict.suspected:
                continue  # nothing follows from it
            self.sim.note("verdict", None, f"{verdict.fault}: {verdict.reason}")
            self.sim.verdicts[verdict.fault] += 1
        return findings.evictions


def _ended(told: MemberFacts, stage: Stage, code: int | None, at_step: Step) -> MemberFacts:
    return MemberFacts(
        member=told.member,
        seat=told.seat,
        node=told.node,
        stage=stage,
        generation=Generation(told.generation),
        step=told.step,
        stepping=told.stepping,
        sharded=told.sharded,
        at_step=at_step,
        port=told.port,
        exit_code=code,
    )
