"""Simulator: a whole job with the real detector and protocol on fake clock, network and hosts.

One seed decides everything: the job's shape, every delay, every fault. Safety is checked at
every move (`simulator_checks`); then the faults stop, and within `RECOVERY_S` virtual seconds
every seat must be in one world again and the job must end with code 0. A seed that fails
says so with the faults and the last events, and plays again the same way::

    python -m ftkit.launch.simulator --seed 17 -v

`simulator_seeds` plays many of them.
"""

import heapq
import random
import sys
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ftkit.core.ids import Boot, MemberId, NodeId, Seat, Term
from ftkit.core.verdict import Fault as Wrong
from ftkit.launch.config import JobConfig
from ftkit.launch.simulator_arenas import Arenas
from ftkit.launch.simulator_checks import SHARDS_GONE, Checker, SimulationFailure
from ftkit.launch.simulator_faults import LOSE_SHARDS, Fault, Kind, schedule
from ftkit.launch.simulator_hosts import Report, SimAgent, SimCoordinator
from ftkit.launch.simulator_injector import FaultInjector
from ftkit.launch.simulator_network import Network
from ftkit.launch.simulator_rank import SimRank
from ftkit.launch.simulator_shards import Shards
from ftkit.recovery.budget import BudgetConfig
from ftkit.recovery.facts import Stage
from ftkit.recovery.plan import Assignment, Mode, Plan, Stop

#: Virtual time at which every fault is over.
HEALED_S = 10.0
#: Virtual time after that within which the job must have recovered, and ended.
RECOVERY_S = 60.0
#: What the simulated job calls a stall; every other time of it follows from this.
MAX_STALL_S = 2.0
#: Of so many jobs the state is in shards: nobody has enough of it to go on from alone.
SHARDED = 0.3
#: Ranks on a node, where their number is given: at most.
SEATS_MAX = 8
#: A job of more ranks takes its time: the coordinator looks less often (`simulator_hosts.LOOK_S`),
#: so steps, stalls, faults and recovery are that much longer.
UNHURRIED = 2500
#: Where training never ends by itself, so that faults have time to happen.
FOREVER = 1_000_000


@dataclass(frozen=True, slots=True)
class SimulatedEnd:
    """How a simulated job ended."""

    seed: int
    ranks: int
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
        ranks: int | None = None,
        verbose: bool = False,
    ) -> None:
        """Draw the job from `seed`.

        Args:
          seed: decides everything that is not given.
          faults: in place of its schedule of faults.
          ranks: how many, in place of its own few.
          verbose: print every event.
        """
        self.seed = seed
        self.rng = rng = random.Random(seed)
        self.now = 0.0
        self.nodes = rng.randint(1, 3)
        self.seats_per_node = rng.randint(1, 3) if self.nodes > 1 else rng.randint(2, 5)
        if self.nodes * self.seats_per_node > 6:
            self.seats_per_node = 2
        if ranks is not None:
            self.nodes, self.seats_per_node = _shape(ranks)
        self._replay = f"--seed {seed} -v" + (f" --ranks {ranks}" if ranks else "")
        self.span = max(1.0, self.size / UNHURRIED)
        self.healed_s = HEALED_S * self.span
        self.config = JobConfig(
            job=f"sim-{seed}",
            command=("simulated",),
            nodes=self.nodes,
            nproc=self.seats_per_node,
            max_stall_s=MAX_STALL_S * self.span,
        )
        self.times = self.config.times
        self.verdicts: Counter[Wrong] = Counter()
        self.slots = rng.randint(1, 8)
        if self.size > self.slots and rng.random() < 0.5:
            self.slots = rng.randint(self.size, 2 * self.size)
        self.endless = rng.random() < 0.5
        self.until = FOREVER if self.endless else rng.randint(6, 14)
        self.tight_budget = rng.random() < 0.15
        self.budget = BudgetConfig()
        if not self.tight_budget:
            self.budget = BudgetConfig(same_place_max=1000, restarts_max=100_000)
        self.forgetful = rng.random() < 0.5
        self.unborn_say_halted = rng.random() < 0.5
        self.step_s = self.span * (rng.choice((0.05, 0.3)) if not self.endless else 0.4)
        if faults is None:
            count = rng.randint(0, 8)
            until_s = self.healed_s - 2 * self.span
            faults = schedule(rng, count=count, until_s=until_s, span=self.span, ranks=self.size)
        self.faults = faults
        self.sharded = rng.random() < SHARDED
        parity = int(self.nodes > 1 and rng.random() < 0.5)
        self.shards = Shards(self, parity)
        self.checker = Checker(self.slots)
        self.ranks: dict[MemberId, SimRank] = {}
        self.agents: dict[NodeId, SimAgent] = {}
        self.ended: Stop | None = None
        self.handled = 0
        self._verbose = verbose
        self._queue: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._sequence = 0
        self.network = Network(self)
        self.arenas = Arenas()
        self.seated: dict[Seat, SimRank] = {}
        """The process that was started last in each seat."""
        self._assigned: dict[int, tuple[Plan, dict[Boot | None, list[Assignment]]]] = {}
        nodes = [NodeId(n) for n in range(self.nodes)]
        self.deaf_until = dict.fromkeys(nodes, 0.0)
        """Until when each node and the coordinator do not hear each other."""
        self.slow_until = dict.fromkeys(nodes, 0.0)
        """Until when plans to each node are late."""
        self._fifo_s: dict[object, float] = {}
        self._log: deque[tuple[float, str, MemberId | None, str]] = deque(maxlen=60)
        self._boots = 0
        for node in nodes:
            self.boot(node)
        self._term = Term(0)
        self.lead()
        self.injector = FaultInjector(self, self.faults)
        self.after(self.healed_s, self._heal)

    @property
    def size(self) -> int:
        """Ranks of the whole job."""
        return self.nodes * self.seats_per_node

    def run(self) -> SimulatedEnd:
        """Play the job to its end.

        Raises:
          SimulationFailure: an invariant broke, or the job did not recover in time.
        """
        try:
            self._play()
            stop = self.ended
            if stop is None:
                raise SimulationFailure(
                    f"no end within {RECOVERY_S * self.span:g} s of the last fault: {self._where()}"
                )
            if stop.code and not self._may_stop(stop):
                raise SimulationFailure(f"ended with {stop.code}: {stop.reason}")
        except (SimulationFailure, AssertionError) as error:
            raise SimulationFailure(self._report(str(error))) from error
        plan = self.coordinator.plan
        return SimulatedEnd(
            seed=self.seed,
            ranks=self.size,
            stop=stop,
            virtual_s=self.now,
            events=self.handled,
            faults=self.injector.struck,
            restarts=plan.restarts if plan else 0,
            worlds=self.checker.worlds,
            verdicts=dict(self.verdicts),
        )

    def _play(self) -> None:
        queue = self._queue
        while queue and self.ended is None:
            self.now, _, action, args = heapq.heappop(queue)
            if self.now > self.healed_s + RECOVERY_S * self.span:
                return
            self.handled += 1
            action(*args)

    def _may_stop(self, stop: Stop) -> bool:
        """Whether a fault can have made the job stop by rights."""
        if "before it joined the job" in stop.reason:
            return self.injector.struck > 0
        if "could not reach each other" in stop.reason:
            return any(fault.kind is Kind.CUT_LINK for fault in self.faults)
        if SHARDS_GONE in stop.reason:
            return any(fault.kind in LOSE_SHARDS for fault in self.faults)
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

    def is_deaf(self, node: NodeId) -> bool:
        """Whether node and coordinator cannot hear each other."""
        return self.now < self.deaf_until[node]

    def assigned(self, plan: Plan, boot: Boot) -> list[Assignment]:
        """The seats of `plan` that this life of an agent starts."""
        if id(plan) not in self._assigned:
            seats = defaultdict[Boot | None, list[Assignment]](list)
            for seat in plan.seats:
                seats[seat.boot].append(seat)
            self._assigned[id(plan)] = plan, seats
            for old in list(self._assigned)[:-4]:
                del self._assigned[old]
        return self._assigned[id(plan)][1].get(boot, [])

    def to_coordinator(self, agent: SimAgent, asked: bool, *, rows: bool = True) -> None:
        """Carry an agent's report; one in twenty is lost, unless it was asked for."""
        if not agent.alive or self.is_deaf(agent.node):
            return
        if asked or self.rng.random() > 0.05:
            report = agent.report(rows=rows)
            self._in_order(("up", agent.node), self._hear, self.coordinator, agent, report)

    def _hear(self, coordinator: SimCoordinator, agent: SimAgent, report: Report) -> None:
        # A report to a coordinator that has died since is lost with it.
        if agent.alive and not self.is_deaf(agent.node):
            coordinator.hear(agent, report)

    def to_agent(self, node: NodeId, plan: Plan) -> None:
        """Carry a plan to a node; one in twenty is lost, and sent again at the next report."""
        if not self.is_deaf(node) and self.rng.random() > 0.05:
            slow = self.rng.uniform(0.3, 1.5) if self.now < self.slow_until[node] else 0.0
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
        before = self.seated.get(seat)
        if before is not None and before.alive:
            raise SimulationFailure(f"two processes share the arena of seat {seat}")
        self.note("spawn", None, f"member {member} in seat {seat} on node {node}")
        rank = self.ranks[member] = self.seated[seat] = SimRank(self, member, seat, node)
        return rank

    def die(self, rank: SimRank, code: int | None) -> None:
        """A process ends: by itself, with -9 by SIGKILL, with None as its node is lost."""
        if not rank.alive:
            return
        rank.cut_off(self.now if rank.stopped_since is None else rank.stopped_since)
        rank.alive = False
        self.note("exit", rank, f"code {code}, {rank.stage.value}, step {rank.step}")
        self.network.died(rank, lossy=code != 0 and self.rng.random() < 0.5)
        self.after(self.rng.uniform(0.003, 0.03), self.agents[rank.node].saw_exit, rank, code)

    def boot(self, node: NodeId) -> None:
        """An agent comes up, and knows nothing."""
        self._boots += 1
        self.agents[node] = SimAgent(self, node, Boot(f"boot-{self._boots}"))

    def lead(self) -> None:
        """The next coordinator begins."""
        self._term = Term(self._term + 1)
        self.coordinator = SimCoordinator(self, self._term)
        self.coordinator.start()

    # Liveness.

    def _heal(self) -> None:
        self.note("HEALED", None, "")
        for node in self.agents:
            self.deaf_until[node] = self.slow_until[node] = 0.0
        self.network.heal()
        for rank in list(self.ranks.values()):
            self.injector.wake(rank)
        self._look()

    def _look(self) -> None:
        """Let an endless job end once every seat trains in one world."""
        if self._whole():
            if self.endless:
                self.until = 3 + max(r.step or 0 for r in self.ranks.values())
            return
        self.after(0.25 * self.span, self._look)

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
        shape += ", sharded" if self.sharded else ""
        return "\n".join(
            [
                f"seed {self.seed} at {self.now:.3f} s: {what}",
                f"job: {shape}; faults:",
                *(f"  {fault}" for fault in self.faults),
                "last events:",
                *(_line(*event) for event in self._log),
                f"replay: python -m ftkit.launch.simulator {self._replay}",
            ]
        )


def _line(at: float, kind: str, member: MemberId | None, text: str) -> str:
    return f"  {at:8.4f} {kind:9} {'' if member is None else member!s:>3} {text}"


def _shape(ranks: int) -> tuple[int, int]:
    """Nodes, and as many seats on each as divide the ranks evenly, up to `SEATS_MAX`."""
    seats = max(n for n in range(1, SEATS_MAX + 1) if ranks % n == 0)
    return ranks // seats, seats


if __name__ == "__main__":
    from ftkit.launch.simulator_seeds import main

    sys.exit(main())
