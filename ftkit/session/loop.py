"""Loop: what every step of one step loop shares."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ftkit.collectives.gradients import GradientReducer, Waitable
from ftkit.collectives.slot_tree import SlotNode
from ftkit.core.errors import NotDeterministic, StateChanged, UsageError
from ftkit.core.ids import Slot
from ftkit.core.ids import Step as StepNumber
from ftkit.session.corrupt import Corrupter
from ftkit.session.feed import Feed, digest_of
from ftkit.session.numbers import Numbers, OnNaN, names_of
from ftkit.session.parts import Parts
from ftkit.session.replicas import OnDiverged, Replicas
from ftkit.session.schedulers import Schedulers
from ftkit.session.snapshots import Snapshots
from ftkit.session.worlds import Worlds

if TYPE_CHECKING:
    from ftkit.session.step import Step


@dataclass(slots=True, kw_only=True)
class Loop:
    """Made by `Session.steps`, used by its steps, one after another."""

    parts: Parts
    worlds: Worlds
    modules: Sequence[torch.nn.Module]
    snapshots: Snapshots
    schedulers: Schedulers
    feed: Feed
    slots: int
    """Slots of the global batch."""
    seed: int
    until: int
    """Steps to commit in all."""
    mean: bool = True
    """Whether gradients and losses are divided by the number of slots, or summed."""
    reducer: GradientReducer = field(init=False)
    current: "Step | None" = None
    """The step whose `with` is open."""
    read: dict[tuple[StepNumber, Slot], int] = field(default_factory=dict)
    """Digests of the batches this rank has read for the step under way, in any attempt."""
    refusals: int = 0
    """Votes in a row that did not pass."""
    verify_every: int | None = None
    on_diverged: OnDiverged = OnDiverged.REPAIR
    on_nan: OnNaN = OnNaN.REPORT
    corrupter: Corrupter = field(init=False)
    replicas: Replicas = field(init=False)
    numbers: Numbers = field(init=False)

    def __post_init__(self) -> None:
        # Modules may share parameters; each is reduced once.
        unique = {id(p): p for m in self.modules for p in m.parameters()}
        self.reducer = GradientReducer(
            unique.values(),
            slots=self.slots,
            reduce=self._reduce,
            mean=self.mean,
        )
        self.corrupter = Corrupter(self.parts.corruptions, self.parts.trace)
        self.replicas = Replicas(
            self.parts, self.snapshots, every=self.verify_every, on_diverged=self.on_diverged
        )
        self.numbers = Numbers(
            self.parts,
            self.reducer,
            self.feed,
            self.corrupter,
            names=names_of(self.modules),
            on_nan=self.on_nan,
        )

    def check_parameters(self) -> None:
        """Raise StateChanged when parameters came or went since the loop began."""
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

    def _reduce(self, nodes: Sequence[SlotNode], out: torch.Tensor, scale: float) -> Waitable:
        if self.current is None:
            raise UsageError("gradients are reduced inside `with step:` only")
        return self.current.reduce_bucket(nodes, out, scale)
