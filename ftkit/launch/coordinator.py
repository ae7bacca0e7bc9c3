"""Coordinator: one loop that turns what agents report into the next plan.

It may die at any moment. Training goes on without it, every agent keeps the newest plan, and
the next coordinator adopts the newest copy it finds, one term higher. All its judgement is
elsewhere and pure: `detection.Detector` says who is at fault, `recovery.protocol` what
follows; this file moves messages.
"""

import gc
import json
import logging
import queue
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from ftkit.checkpoint.parity.protocol import awaited
from ftkit.checkpoint.parity.rounds import Holding, RoundId
from ftkit.core.clock import MonotonicClock
from ftkit.core.detour import COORDINATOR, Detour, agent_end
from ftkit.core.errors import FtkitError, WireError
from ftkit.core.ids import Boot, MemberId, NodeId, Step, Term
from ftkit.core.inventory import Copy, Inventory
from ftkit.core.trace import Trace
from ftkit.core.wire import Line, connect, encode
from ftkit.detection.clock_skew import offset_of
from ftkit.detection.signals import ClockSeen, NodeGap, NodeScored
from ftkit.launch.approximate_lead import tell_approximation, with_remains
from ftkit.launch.checkpoint_lead import CheckpointLead
from ftkit.launch.checkpointing import Report
from ftkit.launch.config import AUTO, JobConfig
from ftkit.launch.decision_costs import DecisionCosts
from ftkit.launch.disk import Disk
from ftkit.launch.ending import End
from ftkit.launch.incidents import Incidents
from ftkit.launch.job_history import JobHistory
from ftkit.launch.job_preflight import FOLDER as PREFLIGHT
from ftkit.launch.job_preflight import STOP
from ftkit.launch.job_preflight import judge as judge_preflight
from ftkit.launch.judge import Judge, rows_from_json
from ftkit.launch.node_advice import advised
from ftkit.launch.pace import Rest
from ftkit.launch.parity_interval import ParityInterval
from ftkit.launch.replacement_wait import ReplacementWait
from ftkit.launch.resources import CLOCK_S
from ftkit.launch.save_interval import SaveInterval
from ftkit.recovery.facts import ALIVE, JobFacts, MemberFacts, Stage
from ftkit.recovery.plan import Mode, Plan, Stop, adopt, first_plan
from ftkit.recovery.protocol import Decision, advance
from ftkit.recovery.waiting import OnLoss

logger = logging.getLogger(__name__)

RESULT = "result.json"

#: An agent that tells nothing for so long, by its own clock, was not there.
PAUSE_S = 2.0

#: The longest that a job with spare nodes waits for what its history says of all nodes.
ADVICE_S = 10.0

#: Cyclic garbage is looked for so often, and at no other time. What a large job's reports leave has no
#: cycles, and the collector took a sixth of the time going through all of it in vain.
COLLECT_S = 60.0


class Coordinator:
    """The job's coordinator. `run` is its life, on the thread that calls it."""

    def __init__(
        self, config: JobConfig, secret: str, agents: Sequence[tuple[str, int]], *, number: int
    ) -> None:
        """Prepare to lead the agents at these addresses, in the order of their nodes.

        Args:
          config: the job.
          secret: the job's secret in hexadecimal.
          agents: each node's (host, port).
          number: higher than that of any coordinator before; agents drop older ones.
        """
        self._config = config
        self._times = config.times
        self._secret = bytes.fromhex(secret)
        self._agents = {NodeId(i): address for i, address in enumerate(agents)}
        self._number = number
        self._clock = MonotonicClock()
        self._inbox: queue.SimpleQueue[tuple[str, NodeId | None, Any]] = queue.SimpleQueue()
        self._lines: dict[NodeId, Line] = {}
        self._dialling: set[NodeId] = set()
        self._silent_since: dict[NodeId, float] = {}
        self._heard: dict[NodeId, float] = {}
        self._reports: dict[NodeId, dict[str, Any]] = {}
        self._told: dict[NodeId, list[MemberFacts]] = {}
        """The members of each report."""
        self._members: dict[MemberId, MemberFacts] = {}
        self._dead_since: dict[MemberId, float] = {}
        self._plan: Plan | None = None
        self._interrupted = ""
        self._stores: dict[str, Any] = {}
        """As the agents were told last."""
        self._judge = Judge(config)
        self._rest = Rest(self._times.tick_s)
        self._incidents = Incidents(Path(config.run_dir))
        self._costs = DecisionCosts(
            config.seats, ranks=config.nproc, parity=config.code is not None
        )
        self._waits = ReplacementWait(OnLoss(config.on_loss))
        self.trace = Trace(
            Path(config.run_dir) / "events" / f"coordinator-{number}.jsonl", coordinator=number
        )
        self._wall = time.time
        self._asked_at = float("-inf")
        self._blind: frozenset[MemberId] = frozenset()
        self._busy: frozenset[NodeId] = frozenset()
        self._scored: dict[NodeId, NodeScored] = {}
        self._advised: dict[NodeId, str] = {}
        self._checked = False
        """Whether all nodes were checked before ranks start."""
        self._refused = ""
        self._led_since = float("-inf")
        """When this coordinator's plan was made."""
        self._history = None
        if config.history:
            self._history = JobHistory(
                config,
                scored=lambda score: self._inbox.put(("scored", None, score)),
                tell=self.trace.event,
            )
        self._checkpoints = CheckpointLead(number, self.trace.event)
        self._saves = SaveInterval(
            self.trace.event, auto=config.checkpoint_auto, report_s=self._times.report_s
        )
        self._parity = ParityInterval(self.trace.event, auto=config.parity_every == AUTO)
        self._disk = Disk(
            config, self.trace.event, changed=lambda: self._inbox.put(("disk", None, None))
        )

    def interrupt(self, reason: str) -> None:
        """End the job in order. From any thread or signal handler."""
        self._inbox.put(("interrupt", None, reason))

    def run(self) -> Stop:
        """Lead the job to its end. Blocks; returns why it ended."""
        tick_s = self._times.tick_s
        started = self._clock.now()
        self._silent_since = dict.fromkeys(self._agents, started)
        next_tick, collect_at = started, started + COLLECT_S
        gc.disable()
        try:
            while True:
                wake = min(next_tick, self._rest.until) if self._rest.owed else next_tick
                try:
                    self._handle(*self._inbox.get(timeout=max(0.0, wake - self._clock.now())))
                    # Judge once for everything that has arrived.
                    for _ in range(self._inbox.qsize()):
                        self._handle(*self._inbox.get_nowait())
                except queue.Empty:
                    pass
                now = self._clock.now()
                if now >= next_tick:
                    self._judge.observer_woke(late_by_s=now - next_tick, at=now)
                    next_tick = now + tick_s
                    self._dial_missing()
                    self._ask_clocks(now)
                    self._ask_others(now)
                if now >= collect_at:
                    gc.collect()
                    collect_at = now + COLLECT_S
                if not self._rest.due(now):
                    continue
                self._lead(now)
                self._tell_steps(now)
                self._rest.looked(now, self._clock.now())
                if self._plan is not None and self._is_over(now):
                    self._tell_steps(now, rest=True)
                    assert self._plan.stop is not None, "an ended plan says why"
                    return self._plan.stop
        finally:
            gc.enable()
            self._disk.close()
            if self._history is not None:
                self._history.close()
            self._incidents.close()
            for line in self._lines.values():
                line.close()
            self.trace.close()

    # What comes in.

    def _handle(self, kind: str, node: NodeId | None, value: Any) -> None:
        match kind:
            case "line" if node is not None:
                self._dialling.discard(node)
                if value is not None:
                    self._lines[node] = value
                    self._judge.reach.connected(node)
                    self._note_return(node)
                    self._silent_since.pop(node, None)
                    self._heard[node] = self._clock.now()
                    self._send_plan(node)
            case "refused" if node is not None:
                self._dialling.discard(node)
                if self._lines:  # else whoever is refused may be us
                    self._judge.reach.refused(node)
                    self._ask_others(self._clock.now())
            case "facts" if node is not None:
                self._take_facts(node, value)
            case "gone" if node is not None:
                if self._lines.get(node) is value:
                    self._lines.pop(node).close()
                    self._silent_since[node] = self._clock.now()
                    self._judge.node_gone(node, self._clock.now())
                    self._dial_missing()  # at once: who is refused knows more than who hears nothing
            case "scored":
                self._take_scores([value])
            case "interrupt":
                self._interrupted = value

    def _take_facts(self, node: NodeId, report: dict[str, Any]) -> None:
        try:
            members = self._members_of(node, report)
        except (FtkitError, KeyError) as error:
            logger.error("node %s reports nonsense: %s", node, error)
            return
        self._note_pause(node, report)
        before = self._reports.get(node)
        if before is not None and before["boot"] == report["boot"]:
            self._judge.node_back(node, self._clock.now())
        self._reports[node], self._told[node] = report, members
        self._heard[node] = self._clock.now()
        self._take_clock(node, report.get("clock"))
        for member in members:
            self._members[member.member] = member
            if member.stage is Stage.DEAD:
                self._dead_since.setdefault(member.member, self._heard[node])
        self._judge.take_report(
            node,
            rows_from_json(report["rows"]),
            members,
            measured=report.get("signals", ()),
            late_s=float(report.get("late_s", 0.0)),
            sent=float(report["at"]),
            at=self._clock.now(),
        )

    def _members_of(self, node: NodeId, report: Mapping[str, Any]) -> list[MemberFacts]:
        """The members that an agent tells of. Most are as they were: those are not read again."""
        told, before = report["members"], self._reports.get(node)
        if before is None or len(told) != len(before["members"]):
            return [MemberFacts.from_json(m) for m in told]
        return [
            known if m == was else MemberFacts.from_json(m)
            for m, was, known in zip(told, before["members"], self._told[node], strict=True)
        ]

    def _take_scores(self, scores: Iterable[NodeScored]) -> None:
        """What the history says of nodes now."""
        for score in scores:
            self._judge.take(score)
            self._scored[score.node] = score
            self._costs.believe(score)
            self._advised = advised(
                self._scored.values(),
                self._costs.costs,
                nodes=self._config.nodes,
                spares=self._config.spare_nodes,
            )

    # Nodes that come and go, and their clocks.

    def _note_return(self, node: NodeId) -> None:
        """A node's agent is connected; note it if it had been before."""
        since = self._silent_since.get(node)
        if node in self._heard and since is not None:
            now = self._clock.now()
            self._judge.take(NodeGap(node=node, at=now, gap_s=now - since))

    def _note_pause(self, node: NodeId, report: Mapping[str, Any]) -> None:
        """Note that an agent stood still, by its own clock: ours may have been late."""
        before = self._reports.get(node)
        if before is None or before["boot"] != report["boot"]:
            return
        gap_s = float(report["at"]) - float(before["at"])
        if gap_s > max(PAUSE_S, 4 * self._times.report_s):
            self._judge.take(NodeGap(node=node, at=self._clock.now(), gap_s=gap_s))

    def _ask_clocks(self, now: float) -> None:
        if now - self._asked_at < CLOCK_S:
            return
        self._asked_at = now
        self._tell_all({"type": "clock", "sent": self._wall()})

    def _take_clock(self, node: NodeId, stamps: Sequence[float] | None) -> None:
        if stamps is None or len(stamps) != 3:
            return
        sent, received, answered = (float(stamp) for stamp in stamps)
        offset_s, error_s = offset_of(sent, received, answered, self._wall())
        self._judge.take(
            ClockSeen(node=node, at=self._clock.now(), offset_s=offset_s, error_s=error_s)
        )

    def _tell_blind(self) -> None:
        """Say of whom nothing is known, or what cannot be told, each time that changes."""
        blind = frozenset(self._judge.blind)
        if blind != self._blind:
            kind = "blind" if blind else "sighted"
            self.trace.event(kind, what="members", members=sorted(blind))
        self._blind = blind
        if (busy := self._judge.busy) != self._busy:
            kind = "blind" if busy else "sighted"
            self.trace.event(kind, what="transfers", nodes=sorted(busy))
        self._busy = busy

    def _dial_missing(self) -> None:
        for node, address in self._agents.items():
            if node not in self._lines and node not in self._dialling:
                self._dialling.add(node)
                threading.Thread(
                    target=self._dial, args=(node, address), name=f"ftkit-dial-{node}", daemon=True
                ).start()

    def _dial(self, node: NodeId, address: tuple[str, int]) -> None:
        """(dialling thread) Connect, then pass on what the agent reports until it hangs up."""
        hello = {"role": "coordinator", "term": self._number}
        try:
            detour = Detour.of_control(self._config.env, COORDINATOR)
            dial = None if detour is None else partial(detour.dial, agent_end(node))
            line = connect(address, self._secret, hello=hello, timeout_s=2.0, dial=dial)
        except WireError as error:
            logger.debug("node %s cannot be reached: %s", node, error)
            refused = isinstance(error.__cause__, ConnectionRefusedError)
            self._inbox.put(("refused" if refused else "line", node, None))
            return
        self._inbox.put(("line", node, line))
        try:
            while True:
                self._inbox.put(("facts", node, line.receive()))
        except WireError:
            self._inbox.put(("gone", node, line))

    # Judging.

    def _lead(self, now: float) -> None:
        """Judge, and send the plan where it changed."""
        if self._plan is None:
            self._plan = self._take_over(now)
            if self._plan is None:
                return
            self._led_since = now
            self._send_plan()
        elif self._stores != self._live_stores():
            self._send_plan()
        if self._waits_for_advice(now) or self._waits_for_preflight():
            return
        facts = self._facts(now)
        self._checkpoint(now, facts.nodes_lost)
        self._costs.look(self._plan, facts, now)
        self._save_as_often_as_pays(now)
        self._make_parity_as_often_as_pays(now)
        arena, written = facts.snapshots, self._checkpoints.written
        if self._plan.mode is not Mode.FORMING or facts.snapshots:
            self._disk.forget()
        else:
            on_disk = self._disk.steps()
            refused = self._refused or self._disk.refused
            if on_disk is None and not (facts.interrupted or refused):
                return  # what a world is formed from is not known yet
            facts = replace(facts, snapshots=on_disk or frozenset(), refused=refused)
            written = max(facts.snapshots, default=None)
            here = {n: r for n, r in self._reports.items() if n not in facts.nodes_lost}
            copies = self._copies(facts.nodes_lost)
            facts = with_remains(facts, self._plan, copies, here, self._costs.costs)
        waits: list[Decision] = []
        if self._plan.mode is Mode.FORMING:
            wait, waits = self._waits.look(self._plan, facts, self._costs, now)
            facts = replace(facts, wait=wait)
        plan, decisions = advance(self._plan, facts, self._config.budget)
        if not decisions:
            self._record(waits, now)
            return
        before, self._plan = self._plan, plan
        halting = plan.mode is Mode.HALTING and before.mode is not Mode.HALTING
        forming = plan.mode is Mode.FORMING and before.mode is not Mode.FORMING
        self._judge.take_plan(plan, at=now)
        # First the orders, then the record of them: the job waits for the orders.
        self._send_plan()
        tell_approximation(before, plan, facts, self.trace.event)
        if before.mode is not Mode.FORMING:
            arena = self._in_memory(facts.nodes_lost)
        decisions = self._costs.explain(
            before, plan, facts, decisions, now=now, arena=arena, written=written
        )
        self._record([*waits, *decisions], now)
        if halting:
            self.trace.event("halt", generation=plan.halted, reason=decisions[0].reason)
        if forming:
            self._lead(now)  # with what is known of snapshots now that nobody writes any

    def _record(self, decisions: Iterable[Decision], now: float) -> None:
        for decision in decisions:
            self.trace.event(
                "decision", action=decision.action, reason=decision.reason, **decision.fields
            )
            self._incidents.decided(decision.action, decision.reason, now)
            if decision.action in ("resume", "form"):
                fields = {k: v for k, v in decision.fields.items() if k != "costs"}
                self.trace.event("resume", **fields)

    def _waits_for_advice(self, now: float) -> bool:
        """Whether where the first ranks start depends on what is not known yet."""
        assert self._plan is not None, "it is what waits"
        return (
            self._history is not None
            and self._config.spare_nodes > 0
            and all(s.boot is None for s in self._plan.seats)
            and len(self._scored) < len(self._reports)
            and now - self._led_since < ADVICE_S
        )

    def _waits_for_preflight(self) -> bool:
        """Whether ranks are not to start yet because nodes are being checked."""
        assert self._plan is not None, "it is what waits"
        fresh = all(s.boot is None for s in self._plan.seats)
        if not self._config.preflight or self._checked or self._interrupted or not fresh:
            return False
        results = {n: r.get("preflight") for n, r in self._reports.items() if n in self._lines}
        if not results or any(r is None for r in results.values()):
            return True
        self._checked = True
        wrong = judge_preflight(results)
        self.trace.event("preflight", nodes=sorted(results), failed=wrong)
        if wrong and self._config.preflight == STOP:
            self._refused = (
                f"{'; '.join(wrong)}. What was found is in {self._config.run_dir}/{PREFLIGHT}; "
                "--preflight warn goes on all the same"
            )
        elif wrong:
            logger.warning("the checks before the job found: %s", "; ".join(wrong))
        return False

    def _tell_steps(self, now: float, *, rest: bool = False) -> None:
        for fields in self._judge.steps(now, rest=rest):
            self.trace.event("steps", **fields)

    def _take_over(self, now: float) -> Plan | None:
        """The plan to begin with, once every agent has spoken or is taken for lost."""
        waiting = [
            n for n in self._agents if n not in self._reports and n not in self._lost_nodes(now)
        ]
        if waiting or not self._reports:
            return None
        copies = [Plan.from_json(r["plan"]) for r in self._reports.values()]
        if any(c.term for c in copies):
            plan = adopt(copies, term=Term(self._number))
            reason = f"coordinator {self._number} goes on from term {plan.term - 1}"
            self._saves.adopt(r.get("saves") for r in self._reports.values())
            self._parity.adopt(r.get("parity") for r in self._reports.values())
        else:
            plan = first_plan(self._config.nodes, self._config.places, term=Term(self._number))
            reason = "the job begins"
        self.trace.event("decision", action="lead", reason=reason, term=plan.term)
        self._judge.take_plan(plan, at=now)
        if self._history is not None:
            self._history.begin(
                {n: str(r.get("name") or f"node-{n}") for n, r in self._reports.items()}
            )
        return plan

    def _facts(self, now: float) -> JobFacts:
        assert self._plan is not None, "facts are judged against a plan"
        lost, unheard = self._lost_nodes(now), self._unheard(now)
        verdicts = self._judge.verdicts(
            self._plan, self._members, now, lost={n: unheard[n] for n in lost}
        )
        self._tell_blind()
        for verdict in verdicts.fresh:
            self.trace.event(
                "suspicion" if verdict.suspected else "verdict",
                fault=verdict.fault.value,
                member=verdict.member,
                seat=verdict.seat,
                reason=verdict.reason,
                since_s=verdict.since_s,
                evidence=dict(verdict.evidence),
                confidence=verdict.confidence,
                peer=verdict.peer,
                generation=self._plan.world.generation if self._plan.world else 0,
            )
            if self._history is not None and not verdict.suspected:
                facts = self._members.get(verdict.member)
                # A drill's strike says nothing of the node that it fell on.
                node = None if facts is None or facts.drilled else facts.node
                self._take_scores(self._history.verdict(verdict, node))
        if verdicts.fresh:
            summary = {"mode": self._plan.mode.value, "step": self._plan.step}
            look = self._incidents.take(verdicts.fresh, self._plan.world, summary, now)
            if look is not None:
                self._tell_all(look)
                self.trace.event("incident", number=look["incident"], looked_at=look["members"])
        for over in verdicts.over:
            self.trace.event(
                "verdict-over",
                fault=over.verdict.fault.value,
                member=over.verdict.member,
                seat=over.verdict.seat,
                suspected=over.verdict.suspected,
                lasted_s=round(over.lasted_s, 3),
            )
        self._ask_for_tests()
        self._ask_for_checks()
        forming = self._plan.mode is Mode.FORMING
        draining = frozenset(n for n, r in self._reports.items() if r.get("draining"))
        return JobFacts(
            awaited=self._awaited(lost) if forming else "",
            members=self._members,
            # Only there are they asked for; in a large job to gather them takes a while.
            snapshots=self._in_memory(lost) if forming else frozenset(),
            dead_s={m: now - since for m, since in self._dead_since.items()},
            evictions=verdicts.evictions,
            nodes_lost=lost,
            nodes_away=frozenset(self._agents) - self._lines.keys() - lost,
            boots={n: Boot(str(r["boot"])) for n, r in self._reports.items()},
            interrupted=self._interrupted,
            refused=self._refused,
            advised={**self._advised, **dict.fromkeys(draining, "it is about to be taken away")},
            draining=draining,
            per_node=self._config.places,
            world_max=self._config.seats,
        )

    def _copies(self, lost: frozenset[NodeId]) -> tuple[Copy, ...]:
        """What the nodes that are not lost hold."""
        return _copies(r for n, r in self._reports.items() if n not in lost)

    def _in_memory(self, lost: frozenset[NodeId]) -> frozenset[Step]:
        """The newest step that living arenas hold whole, if there is one."""
        newest = Inventory(copies=self._copies(lost)).newest_complete()
        return frozenset({newest[1]} if newest else ())

    def _ask_for_tests(self) -> None:
        """Have agents test the paths that are suspect, and record what came of it."""
        inquiry, by_node = self._judge.inquiry, dict[NodeId, list[dict[str, object]]]()
        assert self._plan is not None, "seats are the plan's"
        for probed in inquiry.ended():
            self.trace.event("probed", **asdict(probed))
        if not (orders := inquiry.orders()):
            return
        node_of = {s.seat: s.node for s in self._plan.seats}
        for order in orders:
            host, port = self._agents[node_of[order.b]]
            test = {"number": order.number, "a": order.a, "b": order.b}
            by_node.setdefault(node_of[order.a], []).append(
                test | {"host": host, "port": port, "limit_s": order.limit_s}
            )
        for node, tests in by_node.items():
            if (line := self._lines.get(node)) is not None:
                self._send(node, line, {"type": "pairs", "tests": tests})

    def _ask_for_checks(self) -> None:
        """Have agents of suspects check their nodes, and record what came of it."""
        checks = self._judge.checks
        for found in checks.ended():
            self.trace.event("self-check", **found.to_json())
            self._incidents.checked(found.to_json())
        for node in checks.orders():
            self._incidents.checking(node)
            if (line := self._lines.get(node)) is not None:
                self._send(node, line, {"type": "check"})

    def _send(self, node: NodeId, line: Line, message: Mapping[str, object] | bytes) -> None:
        try:
            line.send(message)
        except WireError:
            logger.debug("node %s hung up; it gets the plan when it is back", node)

    def _checkpoint(self, now: float, lost: frozenset[NodeId]) -> None:
        """Move the writing of a checkpoint on; the plan knows of it only when it has ended."""
        if not self._config.checkpoint_dir or self._plan is None:
            return
        here = {n: r for n, r in self._reports.items() if n not in lost and n in self._lines}
        end = None
        if self._plan.stop is not None:
            # As their agents say: of ranks lost with an agent nobody tells any more.
            ranks = [MemberFacts.from_json(m) for r in here.values() for m in r["members"]]
            last = max((m.step for m in ranks if m.step is not None), default=None)
            begun = [m.entry_step for m in ranks if m.entry_step is not None]
            end = End(
                stop=self._plan.stop,
                trained_to=last if last is not None and last > min(begun, default=0) else None,
                copies=_copies(here.values()),
                running=any(m.stage in ALIVE for m in ranks),
                interrupted=bool(self._interrupted),
            )
        reports = {n: Report.from_json(r["persister"]) for n, r in here.items()}
        if self._checkpoints.advance(reports, end, now=now):
            self._send_plan()

    def _save_as_often_as_pays(self, now: float) -> None:
        """Measure what saves cost; where the interval is left to us, tell it when it changes."""
        if not self._config.checkpoint_dir or self._plan is None or self._plan.stop is not None:
            return
        if self._saves.look(
            self._plan,
            self._costs,
            order=self._checkpoints.order,
            written=self._checkpoints.written,
            now=now,
        ):
            self._send_plan()

    def _make_parity_as_often_as_pays(self, now: float) -> None:
        """Tell how often parity is made, where that is left to us and it changes."""
        if self._config.code is None or self._plan is None or self._plan.stop is not None:
            return
        told = [r["parity"] for r in self._reports.values()]
        if self._parity.look(self._plan, self._costs, told, now=now):
            self._send_plan()

    def _awaited(self, lost: frozenset[NodeId]) -> str:
        """What is worth waiting for before a world is formed from snapshots; "" for nothing."""
        assert self._plan is not None, "facts are judged against a plan"
        if self._config.code is None or self._plan.world is None:
            return ""
        parity = {n: r["parity"] for n, r in self._reports.items() if n not in lost}
        if unchecked := [n for n, p in parity.items() if p["checked"] != self._plan.halted]:
            return f"nodes {sorted(unchecked)} check their snapshots"
        rebuilt = awaited(
            self._copies(lost),
            {n: [Holding.from_json(h) for h in p["holds"]] for n, p in parity.items()},
            {RoundId.from_json(r) for p in parity.values() for r in p["given_up"]},
        )
        return "" if rebuilt is None else f"step {rebuilt.round.step} is rebuilt from parity"

    def _live_stores(self) -> dict[str, Any]:
        """Where the nodes that can be reached serve their arenas."""
        return {str(n): r["store"] for n, r in self._reports.items() if n in self._lines}

    def _lost_nodes(self, now: float) -> frozenset[NodeId]:
        """Nodes whose agent cannot be reached, or is reached and says nothing, for too long.

        Nor do others reach it (`detection.reach`).
        """
        return self._judge.reach.lost(self._unheard(now), now)

    def _unheard(self, now: float) -> dict[NodeId, float]:
        """For how long nothing has come from each node."""
        silent = {n: now - since for n, since in self._silent_since.items()}
        return {**{n: now - at for n, at in self._heard.items()}, **silent}

    def _ask_others(self, now: float) -> None:
        """Have other nodes try to reach those from which nothing comes."""
        unheard, told = self._unheard(now), dict[NodeId, list[dict[str, object]]]()
        recent_s = max(PAUSE_S, 2 * self._times.report_s)
        others = {n for n in self._lines if unheard.get(n, 0.0) < recent_s}
        for order in self._judge.reach.orders(unheard, others, now):
            host, port = self._agents[order.node]
            test = {"number": order.number, "node": order.node, "limit_s": order.limit_s}
            told.setdefault(order.via, []).append(test | {"host": host, "port": port})
            self.trace.event("ask", node=order.node, via=order.via)
        for via, tests in told.items():
            self._send(via, self._lines[via], {"type": "reach", "tests": tests})

    def _send_plan(self, only: NodeId | None = None) -> None:
        """Send the plan to every agent, or to one that has just been reached."""
        if self._plan is None:
            return
        stores = self._live_stores()
        if only is None:
            self._stores = stores
        order = self._checkpoints.order
        message = {
            "type": "plan",
            "plan": self._plan.to_json(),
            "stores": stores,
            "checkpoint": order and order.to_json(),
            "checkpoints_over": self._checkpoints.over,
            "saves": self._saves.told,
            "parity_s": self._parity.told,
        }
        encoded = encode(message)  # once: it grows with the job, and so do those it goes to
        for node, line in list(self._lines.items()):
            if only is not None and node != only:
                continue
            self._send(node, line, encoded)

    def _tell_all(self, message: dict[str, Any]) -> None:
        """Send to every agent that can be reached."""
        for node, line in list(self._lines.items()):
            try:
                line.send(message)
            except WireError:
                logger.debug("node %s hung up", node)

    def _is_over(self, now: float) -> bool:
        """Whether the plan has ended and every agent that can be reached is through."""
        assert self._plan is not None, "there is a plan"
        if self._plan.mode is not Mode.ENDED:
            return False
        lost = self._lost_nodes(now)
        through = {n for n, r in self._reports.items() if r.get("ended")}
        hung_up = {n for n in self._agents if n not in self._lines}
        if set(self._agents) - through - lost - hung_up:
            return False
        assert self._plan.stop is not None, "an ended plan says why"
        stop = self._plan.stop
        outcome = "completed" if stop.code == 0 else "failed"
        self.trace.event("end", outcome=outcome, code=stop.code, reason=stop.reason)
        write_result(Path(self._config.run_dir), stop)
        if self._history is not None:
            begun = min((m.entry_step for m in self._members.values() if m.entry_step), default=0)
            # Who is at a step has committed the one before.
            last = max((max(m.step or 0, m.at_step - 1) for m in self._members.values()), default=0)
            self._history.end(code=stop.code, trained=last > begun)
        return True


def _copies(reports: Iterable[Mapping[str, Any]]) -> tuple[Copy, ...]:
    """What the nodes hold that report so."""
    return tuple(Copy.from_json(c) for r in reports for c in r["copies"])


def write_result(run_dir: Path, stop: Stop) -> None:
    """Leave the job's end where `ftkit run` finds it, whole or not at all."""
    part = run_dir / (RESULT + ".part")
    part.write_text(json.dumps({"code": stop.code, "reason": stop.reason}))
    part.replace(run_dir / RESULT)


def read_result(run_dir: Path) -> Stop | None:
    """What `write_result` left, or None while the job goes on."""
    try:
        value = json.loads((run_dir / RESULT).read_text())
    except FileNotFoundError:
        return None
    return Stop(code=int(value["code"]), reason=str(value["reason"]))
