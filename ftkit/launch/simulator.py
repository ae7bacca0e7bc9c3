"""Simulator: a whole job with the real detector and protocol on fake clock, network and hosts.

One seed decides everything: the job's shape, every delay, every fault. Safety is checked at
every move (`simulator_checks`); then the faults stop, and within `RECOVERY_S` virtual seconds
every seat must be in one world again and the job must end with code 0. A seed that fails
says so with the faults and the last events, and plays again the same way::

    python -m ftkit.launch.simulator --seed 17 -v
"""

import argparse
import heapq
import random
import sys
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ftkit.core.ids import Boot, Generation, MemberId, NodeId, Seat, Step, Term
from ftkit.core.verdict import Fault as Wrong
from ftkit.launch.config import JobConfig
from ftkit.launch.simulator_checks import Checker, SimulationFailure, TrainingState
from ftkit.launch.simulator_faults import Fault, Kind, schedule
from ftkit.launch.simulator_hosts import SNAPSHOTS_KEPT, Report, SimAgent, SimCoordinator
from ftkit.launch.simulator_rank import SimRank
from ftkit.recovery.budget import BudgetConfig
from ftkit.recovery.facts import Stage
from ftkit.recovery.plan import Mode, Plan, Stop

#: Virtual time at which every fault is over.
HEALED_S = 10.0
#: Virtual time after that within which the job must have recovered, and ended.
RECOVERY_S = 60.0
#: What the simulated job calls a stall; every other time of it follows from this.
MAX_STALL_S = 2.0
#: Where training never ends by itself, so that faults have time to happen.
FOREVER = 1_000_000


@dataclass(slots=True)
class _Link:
    """A connection between two processes. A message of an older epoch is lost."""

    up: bool = False
    epoch: int = 0
    last_s: dict[MemberId, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a simulated job ended."""

    seed: int
    stop: Stop
    virtual_s: float
    events: int
    faults: int
    """Faults that struck."""
    restarts: int
    worlds: int
    """Generations that were entered, or offered."""
    verdicts: Mapping[Wrong, int]
    """How often the detector concluded what."""


class Simulation:
    """One job. `run` plays it to its end; single-threaded, used once."""

    def __init__(
        self,
        seed: int,
        *,
        faults: list[Fault] | None = None,
        shape: tuple[int, int] | None = None,
        verbose: bool = False,
    ) -> None:
        """Draw the job from `seed`.

        Args:
          seed: decides everything that is not given.
          faults: in place of its schedule of faults.
          shape: nodes and seats on each, in place of its own.
          verbose: print every event.
        """
        self.seed = seed
        self.rng = rng = random.Random(seed)
        self.now = 0.0
        self.nodes = rng.randint(1, 3)
        self.seats_per_node = rng.randint(1, 3) if self.nodes > 1 else rng.randint(2, 5)
        if self.nodes * self.seats_per_node > 6:
            self.seats_per_node = 2
        if shape is not None:
            self.nodes, self.seats_per_node = shape
        self.config = JobConfig(
            job=f"sim-{seed}",
            command=("simulated",),
            nodes=self.nodes,
            nproc=self.seats_per_node,
            max_stall_s=MAX_STALL_S,
        )
        self.times = self.config.times
        self.verdicts: Counter[Wrong] = Counter()
        self.slots = rng.randint(1, 8)
        self.endless = rng.random() < 0.5
        self.until = FOREVER if self.endless else rng.randint(6, 14)
        self.tight_budget = rng.random() < 0.15
        self.budget = BudgetConfig()
        if not self.tight_budget:
            self.budget = BudgetConfig(same_place_max=1000, restarts_max=100_000)
        self.forgetful = rng.random() < 0.5
        self.unborn_say_halted = rng.random() < 0.5
        self.step_s = rng.choice((0.05, 0.3)) if not self.endless else 0.4
        self.faults = (
            schedule(rng, count=rng.randint(0, 8), until_s=HEALED_S - 2)
            if faults is None
            else faults
        )
        self.checker = Checker(self.slots)
        self.ranks: dict[MemberId, SimRank] = {}
        self.agents: dict[NodeId, SimAgent] = {}
        self.ended: Stop | None = None
        self.struck = 0
        self.handled = 0
        self._verbose = verbose
        self._queue: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._sequence = 0
        self._links: dict[tuple[MemberId, MemberId], _Link] = {}
        #: Until when two seats cannot connect, whoever sits there.
        self._cut_until: dict[frozenset[Seat], float] = {}
        nodes = [NodeId(n) for n in range(self.nodes)]
        self._deaf_until = dict.fromkeys(nodes, 0.0)
        self._slow_until = dict.fromkeys(nodes, 0.0)
        self._fifo_s: dict[object, float] = {}
        self._passed: dict[str, int] = {}
        self._log: deque[tuple[float, str, MemberId | None, str]] = deque(maxlen=60)
        self._healed = False
        self._whole_again = False
        self._boots = 0
        for node in nodes:
            self._boot(node)
        self._term = Term(1)
        self.coordinator = SimCoordinator(self, self._term)
        self.coordinator.start()
        for fault in self.faults:
            if not fault.point:
                self.after(fault.at_s, self._strike, fault, None)
        self.after(HEALED_S, self._heal)

    @property
    def size(self) -> int:
        """Ranks of the whole job."""
        return self.nodes * self.seats_per_node

    def run(self) -> Outcome:
        """Play the job to its end.

        Raises:
          SimulationFailure: an invariant broke, or the job did not recover in time.
        """
        try:
            self._play()
            stop = self.ended
            if stop is None:
                raise SimulationFailure(
                    f"no end within {RECOVERY_S} s of the last fault: {self._where()}"
                )
            if stop.code and not self._may_stop(stop):
                raise SimulationFailure(f"ended with {stop.code}: {stop.reason}")
        except (SimulationFailure, AssertionError) as error:
            raise SimulationFailure(self._report(str(error))) from error
        plan = self.coordinator.plan
        return Outcome(
            seed=self.seed,
            stop=stop,
            virtual_s=self.now,
            events=self.handled,
            faults=self.struck,
            restarts=plan.restarts if plan else 0,
            worlds=self.checker.worlds,
            verdicts=dict(self.verdicts),
        )

    def _play(self) -> None:
        queue = self._queue
        while queue and self.ended is None:
            self.now, _, action, args = heapq.heappop(queue)
            if self.now > HEALED_S + RECOVERY_S:
                return
            self.handled += 1
            action(*args)

    def _may_stop(self, stop: Stop) -> bool:
        """Whether a fault can have made the job stop by rights."""
        if "before it joined the job" in stop.reason:
            return self.struck > 0
        if "could not reach each other" in stop.reason:
            return any(fault.kind is Kind.CUT_LINK for fault in self.faults)
        return self.tight_budget and "replac" in stop.reason

    # Time, chance and messages: what the simulated processes use.

    def after(self, delay_s: float, action: Callable[..., None], *args: Any) -> None:
        """Call `action(*args)` in `delay_s` virtual seconds."""
        self._sequence += 1
        heapq.heappush(self._queue, (self.now + delay_s, self._sequence, action, args))

    def delay_s(self) -> float:
        """A message's time on the way: mostly short, now and then not."""
        if self.rng.random() < 0.03:
            return self.rng.uniform(0.02, 0.3)
        return self.rng.uniform(0.0002, 0.005)

    def compute_s(self) -> float:
        """The time of a forward and backward pass."""
        return self.step_s * self.rng.uniform(0.8, 1.3)

    def note(self, kind: str, rank: SimRank | None, text: str) -> None:
        """Remember an event for the report of a failure."""
        self._log.append((self.now, kind, rank.member if rank else None, text))
        if self._verbose:
            print(_line(*self._log[-1]))

    def _link(self, a: MemberId, b: MemberId) -> _Link:
        key = (a, b) if a < b else (b, a)
        link = self._links.get(key)
        if link is None:
            link = self._links[key] = _Link()
        return link

    def linked(self, a: MemberId, b: MemberId) -> bool:
        """Whether the connection between two members stands."""
        return a == b or self._link(a, b).up

    def connect(self, rank: SimRank, peer: MemberId) -> bool:
        """Make sure that `rank` and `peer` are connected; False when they cannot be."""
        if peer == rank.member:
            return True
        link, other = self._link(rank.member, peer), self.ranks[peer]
        cut_until = self._cut_until.get(frozenset({rank.seat, other.seat}), 0.0)
        if not link.up and other.alive and self.now >= cut_until:
            link.up, link.epoch = True, link.epoch + 1
        return link.up

    def send(
        self, source: SimRank, to: MemberId, action: Callable[..., None], *args: object
    ) -> None:
        """Send over the data plane; in order, and lost when the connection breaks."""
        link = self._link(source.member, to)
        if link.up:
            self._arrive_later(link, to, self._arrive, link.epoch, action, *args)

    def _arrive_later(
        self, link: _Link, to: MemberId, action: Callable[..., None], *args: Any
    ) -> None:
        at = max(self.now + self.delay_s(), link.last_s.get(to, 0.0))
        link.last_s[to] = at
        self.after(at - self.now, action, link, to, *args)

    def _arrive(
        self, link: _Link, to: MemberId, epoch: int, action: Callable[..., None], *args: Any
    ) -> None:
        if link.epoch == epoch:
            rank = self.ranks[to]
            rank.do(action, rank, *args)

    def _break(self, a: MemberId, b: MemberId, *, lossy: bool) -> None:
        """End a connection: a reset loses what is on the way, an end of stream does not."""
        link = self._link(a, b)
        if not link.up:
            return
        link.up = False
        link.epoch += lossy
        for end, peer in ((a, b), (b, a)):
            self._arrive_later(link, end, self._arrive, link.epoch, SimRank.link_broke, peer)

    def is_deaf(self, node: NodeId) -> bool:
        """Whether node and coordinator cannot hear each other."""
        return self.now < self._deaf_until[node]

    def to_coordinator(self, agent: SimAgent, asked: bool) -> None:
        """Carry an agent's report; one in twenty is lost, unless it was asked for."""
        if not agent.alive or self.is_deaf(agent.node):
            return
        if asked or self.rng.random() > 0.05:
            self._in_order(("up", agent.node), self._hear, self.coordinator, agent, agent.report())

    def _hear(self, coordinator: SimCoordinator, agent: SimAgent, report: Report) -> None:
        # A report to a coordinator that has died since is lost with it.
        if agent.alive and not self.is_deaf(agent.node):
            coordinator.hear(agent, report)

    def to_agent(self, node: NodeId, plan: Plan) -> None:
        """Carry a plan to a node; one in twenty is lost, and sent again at the next report."""
        if not self.is_deaf(node) and self.rng.random() > 0.05:
            slow = self.rng.uniform(0.3, 1.5) if self.now < self._slow_until[node] else 0.0
            self._in_order(("down", node), self._plan_arrives, node, plan, extra_s=slow)

    def _plan_arrives(self, node: NodeId, plan: Plan) -> None:
        self.agents[node].take_plan(plan)

    def _in_order(
        self, way: object, action: Callable[..., None], *args: Any, extra_s: float = 0.0
    ) -> None:
        at = max(self.now + self.delay_s() + extra_s, self._fifo_s.get(way, 0.0))
        self._fifo_s[way] = at
        self.after(at - self.now, action, *args)

    # Processes and arenas.

    def spawn(self, member: MemberId, seat: Seat, node: NodeId) -> SimRank:
        """Start a process for a seat."""
        if member in self.ranks:
            raise SimulationFailure(f"member {member} was spawned twice")
        if any(r.alive and r.seat == seat for r in self.ranks.values()):
            raise SimulationFailure(f"two processes share the arena of seat {seat}")
        self.note("spawn", None, f"member {member} in seat {seat} on node {node}")
        rank = self.ranks[member] = SimRank(self, member, seat, node)
        return rank

    def exits(self, rank: SimRank, code: int) -> None:
        """A process exits by itself."""
        self._die(rank, code)

    def kill(self, rank: SimRank) -> None:
        """SIGKILL."""
        self._die(rank, -9)

    def _die(self, rank: SimRank, code: int | None) -> None:
        if not rank.alive:
            return
        rank.alive = False
        self.note("exit", rank, f"code {code}, {rank.stage.value}, step {rank.step}")
        lossy = code != 0 and self.rng.random() < 0.5
        for (a, b), link in list(self._links.items()):
            if link.up and rank.member in (a, b):
                self._break(a, b, lossy=lossy)
        self.after(self.rng.uniform(0.003, 0.03), self.agents[rank.node].saw_exit, rank, code)

    def seal(self, node: NodeId, seat: Seat, state: TrainingState) -> None:
        """A snapshot is complete in a seat's arena, which keeps the newest few."""
        arena = self.agents[node].arenas.setdefault(seat, [])
        others = [s for s in arena if s.step != state.step]
        arena[:] = [*others[-(SNAPSHOTS_KEPT - 1) :], state]

    def forget_newer(self, seat: Seat, state: TrainingState) -> None:
        """What a predecessor left in this arena beyond `state` is of another history."""
        for agent in self.agents.values():
            if seat in agent.arenas:
                agent.arenas[seat] = [s for s in agent.arenas[seat] if s.step <= state.step]

    def snapshot(self, step: Step, attempt: Generation | None) -> TrainingState | None:
        """A sealed snapshot of `step`: of that attempt, or else of the newest one."""
        if step == 0:
            return TrainingState()
        found = [
            s
            for agent in self.agents.values()
            if agent.alive
            for arena in agent.arenas.values()
            for s in arena
            if s.step == step and attempt in (None, s.attempt)
        ]
        return max(found, key=lambda s: s.attempt, default=None)

    # Faults.

    def point(self, name: str, rank: SimRank) -> None:
        """A rank passes a point at which a fault may be due."""
        count = self._passed[name] = self._passed.get(name, 0) + 1
        for fault in self.faults:
            if fault.point == name and fault.nth == count:
                self._strike(fault, rank)

    def _strike(self, fault: Fault, at: SimRank | None) -> None:
        if self.now > HEALED_S:
            return
        alive = [r for _, r in sorted(self.ranks.items()) if r.alive]
        if not alive:
            return
        victim = alive[fault.target % len(alive)]
        if at is not None and fault.target % 3 == 0:
            victim = at
        self.struck += 1
        self.note("FAULT", victim, str(fault))
        node = victim.node
        match fault.kind:
            case Kind.KILL_RANK:
                self.kill(victim)
            case Kind.KILL_SEVERAL:
                self.kill(victim)
                for rank in alive[::2]:
                    self.kill(rank)
            case Kind.KILL_ALL:
                for rank in alive:
                    self.kill(rank)
            case Kind.KILL_JOINER:
                outside = [r for r in alive if r.world is None]
                for rank in outside[:1]:
                    self.kill(rank)
            case Kind.KILL_COORDINATOR:
                self._kill_coordinator(fault.duration_s)
            case Kind.LOSE_NODE:
                self._lose_node(node, fault.duration_s)
            case Kind.LOSE_NODE_AND_COORDINATOR:
                self._kill_coordinator(fault.duration_s)
                self._lose_node(node, fault.duration_s)
            case Kind.STOP_RANK:
                if victim.stopped_since is None:
                    victim.stopped_since = self.now
                    self.after(fault.duration_s, self._continue, victim)
            case Kind.CUT_LINK:
                other = alive[(fault.target + 1) % len(alive)]
                if other is not victim:
                    ends = frozenset({victim.seat, other.seat})
                    self._cut_until[ends] = self.now + fault.duration_s
                    self._break(victim.member, other.member, lossy=True)
            case Kind.DEAF_NODE:
                self._deaf_until[node] = max(self._deaf_until[node], self.now + fault.duration_s)
            case Kind.SLOW_PLANS:
                self._slow_until[node] = self.now + fault.duration_s
            case Kind.REFUSE:
                victim.refuses = True

    def _continue(self, rank: SimRank) -> None:
        if rank.alive and rank.stopped_since is not None:
            self.note("continue", rank, "")
            rank.wake()

    def _kill_coordinator(self, duration_s: float) -> None:
        if self.coordinator.alive:
            self.coordinator.alive = False
            self.after(0.2 + duration_s, self._new_coordinator)

    def _new_coordinator(self) -> None:
        self._term = Term(self._term + 1)
        self.coordinator = SimCoordinator(self, self._term)
        self.coordinator.start()

    def _lose_node(self, node: NodeId, duration_s: float) -> None:
        agent = self.agents[node]
        if not agent.alive:
            return
        agent.alive = False
        for rank in list(agent.ranks.values()):
            self._die(rank, None)
        self.after(0.2 + duration_s, self._revive, node)

    def _revive(self, node: NodeId) -> None:
        self.note("agent", None, f"node {node} is back")
        self._boot(node)

    def _boot(self, node: NodeId) -> None:
        self._boots += 1
        self.agents[node] = SimAgent(self, node, Boot(f"boot-{self._boots}"))

    # Liveness.

    def _heal(self) -> None:
        self._healed = True
        self.note("HEALED", None, "")
        for node in self.agents:
            self._deaf_until[node] = self._slow_until[node] = 0.0
        self._cut_until.clear()
        for rank in list(self.ranks.values()):
            self._continue(rank)
        self._look()

    def _look(self) -> None:
        """Let an endless job end once every seat trains in one world."""
        if self._whole():
            self._whole_again = True
            if self.endless:
                self.until = 3 + max(r.step or 0 for r in self.ranks.values())
            return
        self.after(0.25, self._look)

    def _whole(self) -> bool:
        plan = self.coordinator.plan
        if plan is None or plan.mode is not Mode.RUNNING or plan.world is None:
            return False
        members = [self.ranks[m] for m in plan.world.member_ids]
        return len(members) == len(plan.seats) and all(
            r.alive
            and r.stage is Stage.ACTIVE
            and r.generation == plan.world.generation
            and r.step is not None
            for r in members
        )

    # Reports.

    def _where(self) -> str:
        plan = self.coordinator.plan
        lines = [f"plan {plan.to_json() if plan else None}"]
        lines += [
            f"member {r.member} seat {r.seat}: {r.stage.value} generation {r.generation} "
            f"linked {r.linked} prepared {r.prepared} step {r.step} plan "
            f"{r.plan.order if r.plan else None}"
            for r in self.ranks.values()
            if r.alive
        ]
        return "\n  ".join(lines)

    def _report(self, what: str) -> str:
        shape = f"{self.nodes} nodes x {self.seats_per_node} seats, until step {self.until}"
        return "\n".join(
            [
                f"seed {self.seed} at {self.now:.3f} s: {what}",
                f"job: {shape}; faults:",
                *(f"  {fault}" for fault in self.faults),
                "last events:",
                *(_line(*event) for event in self._log),
                f"replay: python -m ftkit.launch.simulator --seed {self.seed} -v",
            ]
        )


def _line(at: float, kind: str, member: MemberId | None, text: str) -> str:
    return f"  {at:8.4f} {kind:9} {'' if member is None else member!s:>3} {text}"


def main(arguments: list[str] | None = None) -> int:
    """The command line: one seed, or many. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m ftkit.launch.simulator", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--count", type=int, default=1, help="how many seeds to play")
    parser.add_argument("-v", "--verbose", action="store_true", help="print every event")
    options = parser.parse_args(arguments)
    for seed in range(options.seed, options.seed + options.count):
        try:
            outcome = Simulation(seed, verbose=options.verbose).run()
        except SimulationFailure as failure:
            print(failure, file=sys.stderr)
            return 1
        if options.count == 1 or options.verbose:
            print(outcome)
    print(f"{options.count} seeds hold")
    return 0


if __name__ == "__main__":
    sys.exit(main())
