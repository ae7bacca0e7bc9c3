"""Shards: what a simulated job of sharded state keeps in memory, and which of it is whole.

A step can be restored where every shard of one generation is left: in the arena of the rank that
captured it, whoever sits there now, or rebuilt from parity. What is whole the product's `Inventory`
says. Parity is played: a round counts once all nodes have it, and outlives `parity` of them.
"""

from collections import Counter, defaultdict
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


Name = tuple[Generation, Step]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One rank's part of the state, as captured in a world of `size` ranks."""

    state: TrainingState
    generation: Generation
    rank: int
    size: int

    @property
    def name(self) -> Name:
        """Which snapshot it is of. Shards of different ones do not go together."""
        return self.generation, self.state.step

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
    parts: dict[NodeId, dict[Seat, Shard]]
    lost: set[NodeId] = field(default_factory=set)
    rebuilding: bool = False

    @property
    def name(self) -> Name:
        return self.generation, self.state.step


class Shards:
    """All shards of one simulation."""

    def __init__(self, sim: "Simulation", parity: int) -> None:
        self._sim, self._parity = sim, parity
        self._kept: dict[NodeId, dict[Seat, tuple[Shard, ...]]] = defaultdict(dict)
        #: How often each shard is there. Every rank that restores asks what is whole.
        self._there: dict[Name, Counter[Shard]] = defaultdict(Counter)
        self._copies: dict[NodeId, tuple[Copy, ...]] = {}
        self._round: _Round | None = None
        self._making = False
        self.lost = False
        """Whether any node with shards was lost, or out of reach."""

    def seal(self, node: NodeId, seat: Seat, shard: Shard) -> None:
        """A rank's shard is complete in its seat's arena."""
        before = self._kept[node].get(seat, ())
        others = tuple(s for s in before if s.name != shard.name)
        after = self._kept[node][seat] = (*others[-(SHARDS_KEPT - 1) :], shard)
        self._note(node, before, after)
        if self._parity and not self._making:
            self._making = True
            delay_s = self._sim.span * self._sim.rng.uniform(0.05, 0.5)
            self._sim.after(delay_s, self._make_parity)

    def lose(self, node: NodeId) -> None:
        """All that a node held is gone."""
        self.lost = True
        for kept in self._kept.pop(node, {}).values():
            self._note(node, kept, ())
        if self._round is not None:
            self._round.lost.add(node)
            self._note(node, self._round.parts.pop(node, {}).values(), ())

    def copies(self, node: NodeId) -> tuple[Copy, ...]:
        """What a node holds."""
        if node not in self._copies:
            held = [(seat, s) for seat, kept in self._kept[node].items() for s in kept]
            if self._round is not None:
                held += self._round.parts.get(node, {}).items()
            self._copies[node] = tuple(dict.fromkeys(s.copy(node, seat) for seat, s in held))
        return self._copies[node]

    def inventory(self, nodes: Iterable[NodeId]) -> Inventory:
        """What these nodes hold together."""
        return Inventory(copies=tuple(c for n in nodes for c in self.copies(n)))

    def find(self, step: Step) -> TrainingState | None:
        """The state of `step`, if all shards of it are somewhere; of the newest generation."""
        if step == 0:
            return TrainingState()
        whole = self._newest_whole(step)
        return whole.state if whole is not None else None

    def awaited(self, newest: Name | None) -> str:
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

    def _note(self, node: NodeId, before: Iterable[Shard], after: Iterable[Shard]) -> None:
        self._copies.pop(node, None)
        for shard in after:
            self._there[shard.name][shard] += 1
        for shard in before:
            there = self._there[shard.name]
            there[shard] -= 1
            if not there[shard]:
                del there[shard]
            if not there:
                del self._there[shard.name]

    def _newest_whole(self, step: Step | None = None) -> Shard | None:
        """One shard of the newest snapshot, or of the newest of `step`, that is whole."""
        for name in sorted(self._there, reverse=True):
            one = next(iter(self._there[name]))
            if step in (None, name[1]) and len(self._there[name]) == one.size:
                return one
        return None

    def _make_parity(self) -> None:
        """Let the newest whole snapshot outlive nodes, if all of them are there to keep it."""
        self._making = False
        one = self._newest_whole()
        if one is None or not all(agent.alive for agent in self._sim.agents.values()):
            return
        old = self._round
        if old is not None and one.name <= old.name:
            return
        parts: dict[NodeId, dict[Seat, Shard]] = defaultdict(dict)
        for node, seats in self._kept.items():
            for seat, kept in seats.items():
                for shard in kept:
                    if shard.name == one.name:
                        parts[node][seat] = shard
        if sum(map(len, parts.values())) < one.size:
            return  # some of it is only in the round before
        self._round = _Round(one.state, one.generation, one.size, dict(parts))
        for node in {*parts, *(old.parts if old is not None else ())}:
            before = old.parts.get(node, {}) if old is not None else {}
            self._note(node, before.values(), parts.get(node, {}).values())

    def _rebuild(self, kept: _Round) -> None:
        kept.rebuilding = False
        living = [n for n, agent in self._sim.agents.items() if agent.alive]
        if kept is not self._round or len(kept.lost) > self._parity or not living:
            return
        here = {shard.rank for parts in kept.parts.values() for shard in parts.values()}
        made = {
            Seat(-1 - rank): Shard(
                state=kept.state, generation=kept.generation, rank=rank, size=kept.size
            )
            for rank in range(kept.size)
            if rank not in here
        }
        kept.parts[living[0]] = kept.parts.get(living[0], {}) | made
        self._note(living[0], (), made.values())
