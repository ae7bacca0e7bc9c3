"""Loop: what every step of one step loop shares."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ftkit.checkpoint.shards import register_shards
from ftkit.collectives.gradients import GradientReducer, Waitable
from ftkit.collectives.sharded import ShardedReducer, assign_rounds
from ftkit.collectives.sharded_unit import Pending
from ftkit.collectives.slot_tree import SlotNode
from ftkit.collectives.staged import StageReducer
from ftkit.core.errors import NotDeterministic, StateChanged, StepRolledBack, UsageError
from ftkit.core.ids import Slot
from ftkit.core.ids import Step as StepNumber
from ftkit.recovery.micro_batches import Together, rounds, together
from ftkit.session.corrupt import Corrupter
from ftkit.session.feed import Feed, digest_of
from ftkit.session.layers import Layers
from ftkit.session.numbers import Numbers, OnNaN, names_of
from ftkit.session.parts import Parts
from ftkit.session.recutter import Recutter
from ftkit.session.replicas import OnDiverged, Replicas
from ftkit.session.scaled import Scaled
from ftkit.session.schedulers import Schedulers
from ftkit.session.shard_watch import ShardWatch
from ftkit.session.shares import Shares
from ftkit.session.snapshots import Snapshots
from ftkit.session.worlds import Worlds

if TYPE_CHECKING:
    from ftkit.session.step import Step


class Play(NamedTuple):
    """One micro-batch of a rank."""

    at: Slot
    """Its place in the sum."""
    slots: Together
    """What it holds; nothing where the rank only plays along."""


@dataclass(slots=True, kw_only=True)
class Loop:
    """Made by `Session.steps`, used by its steps, one after another."""

    parts: Parts
    worlds: Worlds
    modules: Sequence[torch.nn.Module]
    """Empty until they are built, where they are sharded."""
    snapshots: Snapshots
    schedulers: Schedulers
    feed: Feed
    slots: int
    """Slots of the global batch; where micro-batches are resized, each is one sample."""
    seed: int
    until: int
    """Steps to commit in all."""
    mean: bool = True
    """Whether gradients and losses are divided by the number of slots, or summed."""
    rebalance: bool = False
    """Whether ranks hold as many slots as they are fast."""
    divided: bool = False
    """Whether the state of an optimizer is divided among the ranks."""
    scaled: Scaled | None = None
    """Where micro-batches are resized."""
    shares: Shares = field(init=False)
    layers: Layers | None = None
    """Of a pipeline, of which each rank holds a stage."""
    recut: bool = True
    """Whether its stages are cut anew while it trains."""
    recutter: Recutter | None = field(init=False, default=None)
    reducer: GradientReducer | ShardedReducer | StageReducer = field(init=False)
    current: "Step | None" = None
    """The step whose `with` is open."""
    read: dict[tuple[StepNumber, Slot], int] = field(default_factory=dict)
    """Digests of the batches this rank has read for the step under way, in any attempt."""
    refusals: int = 0
    """Votes in a row that did not pass."""
    sharded: bool = field(init=False)
    verify_every: int | None = None
    on_diverged: OnDiverged = OnDiverged.REPAIR
    on_nan: OnNaN = OnNaN.REPORT
    loss_scaling: bool = False
    """Whether a GradScaler is protected: it looks at the gradients after the vote, and drops them."""
    corrupter: Corrupter = field(init=False)
    replicas: Replicas = field(init=False)
    shard_watch: ShardWatch = field(init=False)
    numbers: Numbers = field(init=False)

    def __post_init__(self) -> None:
        self.sharded = not self.modules
        self.shares = Shares(self.parts, self.slots, rebalance=self.rebalance)
        self.corrupter = Corrupter(self.parts.corruptions, self.parts.trace)
        self.replicas = Replicas(
            self.parts,
            self.snapshots,
            # Of shards there is nothing that all ranks hold.
            every=0 if self.sharded else self.verify_every,
            on_diverged=self.on_diverged,
        )
        self.shard_watch = ShardWatch(
            self.parts,
            self.snapshots,
            every=self.verify_every if self.sharded else 0,
            on_diverged=self.on_diverged,
        )
        self.numbers = Numbers(
            self.parts,
            self.feed,
            self.corrupter,
            on_nan=OnNaN.REPORT if self.loss_scaling else self.on_nan,
            loss_scaling=self.loss_scaling,
        )
        if self.layers is not None and self.recut:
            self.recutter = Recutter(
                self.parts, self.layers, self.snapshots, self.worlds, slots=self.slots
            )
        if self.sharded:
            return
        # Modules may share parameters; each is reduced once.
        unique = {id(p): p for m in self.modules for p in m.parameters()}
        self.reducer = GradientReducer(
            unique.values(),
            slots=self.slots,
            reduce=self._reduce,
            mean=self.mean,
            running=self.scaled is not None,
        )
        self.numbers.follow(self.reducer, names_of(self.modules))

    def adopt(self, model: torch.nn.Module, scheduler: object | None) -> None:
        """Train this sharded model, built for the present world, from the next step on."""
        group = self.parts.group
        self.close()
        if self.layers is not None:
            self.reducer = StageReducer([model], slots=self.slots, mean=self.mean)
        else:
            self.reducer = ShardedReducer(
                [model],
                slots=self._places(group.size),
                weights=self.slots,
                world_size=group.size,
                rank=group.rank,
                exchange=self._exchange,
                mean=self.mean,
            )
        self.modules, self.schedulers = [model], Schedulers(scheduler)
        self.numbers.follow(self.reducer, names_of(self.modules))

    def close(self) -> None:
        """Let go of the model."""
        if self.modules:
            self.reducer.close()
            if self.sharded:
                self.modules = ()

    def plays_of(self, world_size: int, rank: int) -> list[Play]:
        """What a rank of a model in parts plays in a step, one after another.

        As many on every rank, whose passes need each other: from `slots` on it is no slot, and what
        comes of it is dropped. Of a pipeline every stage plays all of them, which are the last
        one's: it knows their losses.
        """
        if self.layers is not None:
            return self.alone(range(self.slots)) if rank == world_size - 1 else []
        if self.scaled is not None:
            mine = rounds(self.slots, world_size, rank, self.scaled.most)
            return [Play(Slot(j * world_size + rank), slots) for j, slots in enumerate(mine)]
        return self.alone(assign_rounds(self.slots, world_size, rank))

    def alone(self, slots: Iterable[int]) -> list[Play]:
        """Each slot a micro-batch of its own; from `slots` on, there is none."""
        return [Play(Slot(s), (Slot(s),) if s < self.slots else ()) for s in slots]

    def grouped(self, slots: Sequence[Slot]) -> list[Play]:
        """The micro-batches of a rank that holds the whole model, and these slots."""
        if self.scaled is None:
            return self.alone(slots)
        return [Play(group[0], group) for group in together(slots, self.scaled.most)]

    def _places(self, world_size: int) -> int:
        """How many terms the sum of a model in shards has."""
        if self.scaled is None:
            return self.slots
        return world_size * len(rounds(self.slots, world_size, 0, self.scaled.most))

    def complete(self) -> None:
        """Enter the next world in the middle of a step that counts: rows of it are missing here.

        Raises:
          StepRolledBack: a part of its state was lost, and what snapshots have is loaded.
        """
        step, restores = self.current, self.snapshots.restores
        assert step is not None, "protected optimizers step inside `with step:`"
        self.worlds.settle(in_step=True)
        if self.snapshots.restores != restores:
            step.undo()
            raise StepRolledBack(f"a part of the state of step {step.index} was lost")

    def check_parameters(self) -> None:
        """Raise StateChanged when parameters came or went since the loop began."""
        for module in self.modules if self.sharded else ():
            register_shards(module)
        now = {id(p) for m in self.modules for p in m.parameters() if p.requires_grad}
        known = self.reducer.ids
        if now != known:
            raise StateChanged(
                f"the model has {len(now)} parameters that require gradients, it had "
                f"{len(known)} when the step loop began, and {len(now & known)} are the same: "
                "add, replace, freeze and thaw parameters before that"
            )

    def note_batch(self, step: StepNumber, slot: Slot, batch: Any) -> None:
        """Remember what a slot held; NotDeterministic when it held something else before."""
        digest = digest_of(batch)
        if self.read.setdefault((step, slot), digest) != digest:
            raise NotDeterministic(
                f"slot {slot} of step {step} held other data when it was played again. Reading "
                "a sample twice must give the same: draw random augmentation from torch, numpy "
                "or random, which are seeded for each slot, and from nothing else"
            )

    def after_exception(self, step: "Step") -> None:
        """The script caught its own exception from `step` and asks for the next one.

        An attempt that was not committed is played again, by all ranks alike: what this one
        sent of it and the others still wait for must not be mixed with what it sends next.

        Raises:
          UsageError: the exception came after the commit; nothing can tell which of the
            optimizers had stepped.
        """
        if step.committed:
            raise UsageError(
                f"step {step.index} was committed, but an exception left `with step:` before its "
                "end: some optimizers may have stepped and others not. Let the exception end "
                "the process, or catch it inside"
            )
        group = self.parts.group
        if group.size > 1:
            group.abort(group.world.generation, f"an exception ended an attempt at {step.index}")

    def _exchange(self, out: torch.Tensor, rows: torch.Tensor, *, last: bool) -> Pending:
        if self.current is None:
            raise UsageError("sharded models are trained inside `with step:` only")
        return self.current.exchange_rows(out, rows, last=last)

    def _reduce(self, nodes: Sequence[SlotNode], out: torch.Tensor, scale: float) -> Waitable:
        if self.current is None:
            raise UsageError("gradients are reduced inside `with step:` only")
        return self.current.reduce_bucket(nodes, out, scale)
