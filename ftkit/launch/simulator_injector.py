"""FaultInjector: does the scheduled faults to a simulated job, each when or where it is due."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ftkit.core.ids import NodeId
from ftkit.launch.simulator_faults import Fault, Kind

if TYPE_CHECKING:
    from ftkit.launch.simulator import Simulation
    from ftkit.launch.simulator_rank import SimRank


class FaultInjector:
    """Of one simulation; faults that are due after it was healed do nothing."""

    def __init__(self, sim: "Simulation", faults: Iterable[Fault]) -> None:
        self._sim = sim
        self.struck = 0
        """Faults that struck so far."""
        self._passed = Counter[str]()
        self._at_point: dict[tuple[str, int], list[Fault]] = defaultdict(list)
        for fault in faults:
            if not fault.point:
                sim.after(fault.at_s, self._strike, fault, None)
            else:
                self._at_point[fault.point, fault.nth].append(fault)

    def point(self, name: str, rank: "SimRank", *, within_s: float | None = None) -> None:
        """A rank passes a point at which a fault may be due; or begins to, and takes `within_s`."""
        self._passed[name] += 1
        for fault in self._at_point.get((name, self._passed[name]), ()):
            if within_s is None:
                self._strike(fault, rank)
            else:
                self._sim.after(self._sim.rng.uniform(0.0, within_s), self._strike, fault, rank)

    def wake(self, rank: "SimRank") -> None:
        """SIGCONT, to one that lies stopped."""
        if rank.alive and rank.stopped_since is not None:
            self._sim.note("continue", rank, "")
            rank.wake()

    def _strike(self, fault: Fault, at: "SimRank | None") -> None:
        sim = self._sim
        if sim.now > sim.healed_s:
            return
        alive = [r for _, r in sorted(sim.ranks.items()) if r.alive]
        if not alive:
            return
        victim = alive[fault.target % len(alive)]
        if at is not None and fault.target % 3 == 0:
            victim = at
        self.struck += 1
        sim.note("FAULT", victim, str(fault))
        node = victim.node
        match fault.kind:
            case Kind.KILL_RANK:
                sim.die(victim, -9)
            case Kind.KILL_SEVERAL:
                sim.die(victim, -9)
                for rank in alive[::2]:
                    sim.die(rank, -9)
            case Kind.KILL_ALL:
                for rank in alive:
                    sim.die(rank, -9)
            case Kind.KILL_JOINER:
                outside = [r for r in alive if r.world is None]
                for rank in outside[:1]:
                    sim.die(rank, -9)
            case Kind.KILL_COORDINATOR:
                self._kill_coordinator(fault.duration_s)
            case Kind.LOSE_NODE:
                self._lose_node(node, fault.duration_s)
            case Kind.LOSE_NODE_AND_COORDINATOR:
                self._kill_coordinator(fault.duration_s)
                self._lose_node(node, fault.duration_s)
            case Kind.STOP_RANK:
                if victim.stopped_since is None:
                    victim.stopped_since = sim.now
                    sim.after(fault.duration_s, self.wake, victim)
            case Kind.HANG_RANK:
                victim.hang()
            case Kind.CUT_LINK:
                other = alive[(fault.target + 1) % len(alive)]
                if other is not victim:
                    sim.network.cut(victim, other, sim.now + fault.duration_s)
            case Kind.DEAF_NODE:
                sim.shards.lost = True
                sim.deaf_until[node] = max(sim.deaf_until[node], sim.now + fault.duration_s)
            case Kind.SLOW_PLANS:
                sim.slow_until[node] = sim.now + fault.duration_s
            case Kind.REFUSE:
                victim.refuses = True

    def _kill_coordinator(self, duration_s: float) -> None:
        if self._sim.coordinator.alive:
            self._sim.coordinator.alive = False
            self._sim.after(0.2 + duration_s, self._sim.lead)

    def _lose_node(self, node: NodeId, duration_s: float) -> None:
        sim = self._sim
        agent = sim.agents[node]
        if not agent.alive:
            return
        agent.alive = False
        sim.arenas.lose(node)
        sim.shards.lose(node)
        for rank in list(agent.ranks.values()):
            sim.die(rank, None)
        sim.after(0.2 + duration_s, self._revive, node)

    def _revive(self, node: NodeId) -> None:
        self._sim.note("agent", None, f"node {node} is back")
        self._sim.boot(node)
