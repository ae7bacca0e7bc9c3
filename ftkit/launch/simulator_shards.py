"""Shards: what a simulated job of sharded state keeps in memory, and which of it is whole.

A step can be restored where every shard of one generation is left: in the arena of the rank that
captured it, whoever sits there now, or rebuilt from parity. What is whole the product's `Inventory`
says. Parity is played: a round counts once all nodes have it, and outlives `parity` of them.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ftkit.core.ids import Generation, NodeId, Seat, Step
from ftkit.core.inventory import Copy, Inventory, Part
from ftkit.launch.simulator_checks import TrainingState

if TYPE_CHECKING:
    from ftkit.launch.simulator import Simulation

#: The newest that a seat's arena keeps: ranks differ by a step, and one may be half written.
SHARDS_KEPT = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One rank's part of the state, as captured in a world of `size` ranks."""

    state: TrainingState
    generation: Generation
    rank: int
    size: int

    def copy(self, node: NodeId, seat: Seat) -> Copy:
        """As an agent tells of it."""
        layout = f"{self.rank} of {self.size}"
        return Copy(
            seat=seat,
            node=node,
            path=f"seat-{seat}",
            step=self.state.step,
            generation=self.generation,
            part=Part(layout=layout, first=0, end=1, total=1, layouts=self.size),
        )


@dataclass(slots=True)
class _Round:
    """A snapshot with parity: its parts are pinned, and those of lost nodes can be made again."""

    state: TrainingState
    generation: Generation
    size: int
    parts: list[tuple[NodeId, Seat, Shard]]
    lost: set[NodeId] = field(default_factory=set)
    rebuilding: bool = False

    @property
    def name(self) -> tuple[Generation, Step]:
        return self.generation, self.state.step


class Shards:
    """All shards of one simulation."""

    def __init__(self, sim: "Simulation", parity: int) -> None:
        self._sim, self._parity = sim, parity
        self._kept: dict[NodeId, dict[Seat, list[Shard]]] = defaultdict(dict)
        self._round: _Round | None = None
        self._making = False
        self.lost = False
        """Whether any node with shards was lost, or out of reach."""

    def seal(self, node: NodeId, seat: Seat, shard: Shard) -> None:
        """A rank's shard is complete in its seat's arena."""
        name = (shard.generation, shard.state.step)
        kept = [s for s in self._kept[node].get(seat, []) if (s.generation, s.state.step) != name]
        self._kept[node][seat] = [*kept[-(SHARDS_KEPT - 1) :], shard]
        if self._parity and not self._making:
            self._making = True
            self._sim.after(self._sim.rng.uniform(0.05, 0.5), self._make_parity)

    def lose(self, node: NodeId) -> None:
        """All that a node held is gone."""
        self.lost = True
        self._kept.pop(node, None)
        if self._round is not None:
            self._round.lost.add(node)
            self._round.parts = [p for p in self._round.parts if p[0] != node]

    def copies(self, node: NodeId) -> tuple[Copy, ...]:
        """What a node holds."""
        found = {
            shard.copy(node, seat): None
            for seat, kept in self._kept.get(node, {}).items()
            for shard in kept
        }
        for at, seat, shard in self._round.parts if self._round is not None else ():
            if at == node:
                found[shard.copy(node, seat)] = None
        return tuple(found)

    def inventory(self, nodes: Iterable[NodeId]) -> Inventory:
        """What these nodes hold together."""
        return Inventory(copies=tuple(c for n in nodes for c in self.copies(n)))

    def find(self, step: Step) -> TrainingState | None:
        """The state of `step`, if all shards of it are somewhere; of the newest generation."""
        if step == 0:
            return TrainingState()
        generation = self.inventory(self._living()).complete().get(step)
        everywhere = [s for seats in self._kept.values() for kept in seats.values() for s in kept]
        if self._round is not None:
            everywhere += [shard for _, _, shard in self._round.parts]
        named = [s for s in everywhere if (s.state.step, s.generation) == (step, generation)]
        return named[0].state if named else None

    def awaited(self, newest: tuple[Generation, Step] | None) -> str:
        """What is being rebuilt from parity, and worth waiting for; "" for nothing.

        `newest` is whole by the same reports that the answer is judged with.
        """
        kept = self._round
        if kept is None or not kept.lost or len(kept.lost) > self._parity:
            return ""
        if newest is not None and newest >= kept.name:
            return ""
        if not kept.rebuilding:
            kept.rebuilding = True
            self._sim.after(self._sim.rng.uniform(0.1, 0.8), self._rebuild, kept)
        return f"step {kept.state.step} is rebuilt from parity"

    def _living(self) -> list[NodeId]:
        return [n for n, agent in self._sim.agents.items() if agent.alive]

    def _make_parity(self) -> None:
        """Let the newest whole snapshot outlive nodes, if all of them are there to keep it."""
        self._making = False
        living = self._living()
        newest = self.inventory(living).newest_complete()
        if newest is None or len(living) < self._sim.nodes:
            return
        if self._round is not None and newest <= self._round.name:
            return
        parts = {
            shard.rank: (node, seat, shard)
            for node, seats in self._kept.items()
            for seat, kept in seats.items()
            for shard in kept
            if (shard.generation, shard.state.step) == newest
        }
        _, _, one = next(iter(parts.values()))
        if len(parts) == one.size:
            self._round = _Round(one.state, one.generation, one.size, list(parts.values()))

    def _rebuild(self, kept: _Round) -> None:
        kept.rebuilding = False
        living = self._living()
        if kept is not self._round or len(kept.lost) > self._parity or not living:
            return
        here = {shard.rank for _, _, shard in kept.parts}
        for rank in range(kept.size):
            if rank not in here:
                shard = Shard(
                    state=kept.state, generation=kept.generation, rank=rank, size=kept.size
                )
                kept.parts.append((living[0], Seat(-1 - rank), shard))
