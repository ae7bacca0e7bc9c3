"""Capture: a simulated rank's snapshot, or shard of one, which becomes complete while it trains on."""

from typing import TYPE_CHECKING

from ftkit.core.world import World
from ftkit.launch.simulator_checks import TrainingState
from ftkit.launch.simulator_shards import Shard

if TYPE_CHECKING:
    from ftkit.launch.simulator_rank import SimRank


class Capture:
    """Of one rank. At most one is under way."""

    def __init__(self, rank: "SimRank") -> None:
        self._rank = rank
        self._unsealed: TrainingState | None = None
        self._world: World | None = None
        """In which it was begun: of a sharded state its shard is captured."""

    def begin(self, state: TrainingState) -> None:
        """Capture `state`; it is sealed after a while, unless `seal` comes first."""
        sim = self._rank.sim
        self._unsealed, self._world = state, self._rank.world
        sim.after(sim.rng.uniform(0.01, 0.2), self._rank.do, self._seal_this, state)

    def seal(self) -> None:
        """Finish what is under way: it is in the arena now."""
        state, self._unsealed = self._unsealed, None
        if state is None:
            return
        rank, sim = self._rank, self._rank.sim
        if not sim.sharded:
            sim.arenas.seal(rank.node, rank.seat, state)
            return
        world = self._world
        number = world.rank_of(rank.member) if world is not None else None
        assert world is not None, "a shard is of a world"
        assert number is not None, "a rank is in its own world"
        shard = Shard(state=state, generation=world.generation, rank=number, size=world.size)
        sim.shards.seal(rank.node, rank.seat, shard)

    def _seal_this(self, state: TrainingState) -> None:
        if self._unsealed is state:
            self.seal()
