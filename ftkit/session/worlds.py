"""Worlds: how this rank gets into a world, holding the state all its members stand at.

Three ways in: the first world, formed when every seat is ready; a repaired one, entered from
standing still; and a grown one, into which the members vote a newcomer between two steps. And one to
stay: a pipeline may cut its stages anew in the world it is in (`recut`).

Sharded state is cut otherwise in each world, so whoever enters one builds the model again and
loads its shards of the step that all stand at from snapshots: for the members of the world
before, as for a newcomer.
"""

import json
import time
from collections.abc import Callable, Sequence

import torch

from ftkit.checkpoint.ports import BoxSource
from ftkit.checkpoint.restore_shards import Incomplete, ShardsRestored
from ftkit.checkpoint.shards import is_dtensor
from ftkit.collectives.group import Group
from ftkit.core.errors import (
    GenerationAborted,
    IntegrityError,
    JobStopped,
    Unreachable,
    UsageError,
    WireError,
)
from ftkit.core.fault_plan import Point
from ftkit.core.ids import Step
from ftkit.core.world import World
from ftkit.detection.row import Phase
from ftkit.recovery.facts import Allowed
from ftkit.recovery.promotion import BlocksLost
from ftkit.session.blocks import Blocks
from ftkit.session.layers import Layers
from ftkit.session.membership import Entry, GiveUp, Link, admission
from ftkit.session.parts import Parts
from ftkit.session.patch import patch_of
from ftkit.session.snapshots import Snapshots

#: Before a newcomer looks again for a world whose members it can reach.
LOOK_AGAIN_S = 0.2


class Worlds:
    """Moves one rank from world to world. Used by the training thread."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._modules: Callable[[], Sequence[torch.nn.Module]] = tuple
        self._snapshots: Snapshots | None = None
        self._build: Callable[[World], None] | None = None
        self._blocks: Blocks | None = None
        self._layers: Layers | None = None
        self._looked_ahead = False
        self._began = 0.0
        """When this rank began to build and load for the present cut of the state."""
        self.switch_s = 0.0
        """What that took the slowest rank, the last time: the same figure on all."""
        self._in_step = False
        self._owed: Entry | None = None
        """The world entered before the step loop, when it stands at a step to be loaded."""

    def begin_stepping(
        self,
        modules: Callable[[], Sequence[torch.nn.Module]],
        snapshots: Snapshots,
        build: Callable[[World], None] | None = None,
        *,
        layers: Layers | None = None,
        blocks: Blocks | None = None,
        allowed: Allowed = Allowed.NOTHING,
    ) -> None:
        """From here on entering a world means to hold its state.

        A rank that is in the first world already agrees with the others on the initial state, or
        loads the checkpoint that the job begins from.

        Args:
          modules: gives what is trained.
          snapshots: where state is kept.
          build: makes the sharded model of a world; None where every rank holds all of it.
          layers: of a pipeline, of which every rank holds other tensors.
          blocks: where the state of an optimizer is divided among the ranks.
          allowed: by what that is not the same lost shards may be replaced.
        """
        self._blocks = blocks
        self._modules, self._snapshots, self._build = modules, snapshots, build
        self._layers = layers
        membership = self._parts.membership
        membership.ready(stepping=True, sharded=build is not None, allowed=allowed)
        self._began = time.monotonic()
        if membership.active and membership.step == 0:
            try:
                if build is not None:
                    build(self._parts.group.world)
                if not self._settle_blocks(self._parts.group.world, None):
                    return
                self._share_initial_state()
                self._agree()
            except GenerationAborted:
                return  # the next world shares it again
        owed = self._owed
        if owed and membership.active and membership.generation == owed.world.generation:
            self._restore(owed)

    def settle(self, *, in_step: bool = False) -> None:
        """Return once this rank is in a world that goes on. Blocks.

        `in_step`: in the middle of a step that counts, which is captured at its end.

        Raises:
          JobStopped: the job is over for this rank.
        """
        parts, self._in_step = self._parts, in_step
        while (task := parts.membership.next_task(self._stand_still)) is not None:
            parts.recorder.phase(Phase.RECOVERY)
            match task:
                case Link(world):
                    if self._snapshots is not None and not self._looked_ahead:
                        # Once: a spare is linked to world after world, and has to be quick.
                        self._looked_ahead = self._snapshots.look_ahead(world)
                    try:
                        parts.group.connect(world.members, timeout_s=parts.stall_s)
                    except WireError:
                        # Somebody there is being replaced: the next world will do.
                        parts.membership.wait_changed(LOOK_AGAIN_S)
                    else:
                        parts.membership.linked(world)
                case Entry():
                    self._enter(task)
                case GiveUp():
                    assert self._snapshots is not None, "stepping"
                    self._snapshots.give_up()
                    parts.membership.gave_up()
        if parts.recorder.shown is Phase.RECOVERY:
            # Said above, or before `switch`. The user's code comes next, which may hang like any other.
            parts.recorder.phase(Phase.OPTIMIZER if in_step else Phase.BETWEEN)

    def _stand_still(self) -> None:
        """Who trains and waits for the coordinator's word holds up nobody: the row says so."""
        if self._snapshots is not None:
            self._parts.recorder.phase(Phase.RECOVERY)

    def switch(self, world: World, step: Step) -> None:
        """Enter the newcomers' world with all other members, after `step`; or leave, if not in it.

        Raises:
          JobStopped: this rank is not in it: its node is about to be taken away.
        """
        group = self._parts.group
        if self._build is not None:
            # Everybody loads its new shards from what was captured here.
            assert self._snapshots is not None, "stepping"
            try:
                self._snapshots.ensure(step, group.world)
            except GenerationAborted as error:
                group.abort(group.world.generation, str(error))
                return
            self._snapshots.give_up()
        if self._parts.member not in world.member_ids:
            # To exit earlier would break the world that the others are about to leave.
            if self._parts.membership.gone_on(world.generation):
                self._parts.trace.event("left", step=step, generation=world.generation)
                raise JobStopped(f"its node is about to be taken away; it left after step {step}")
            return
        newcomers = [m.member for m in world.members if m.member not in group.world.member_ids]
        for newcomer in newcomers:
            try:
                group.tell(newcomer, admission(world, step))
            except WireError:
                continue  # it died this instant; entering will notice
        if newcomers and self._build is None and self._snapshots is not None:
            # What is captured lazily a newcomer waits for, and all wait for the newcomer.
            self._snapshots.gate()
        self._enter(Entry(world, step, True))

    def recut(self, step: Step, near: Sequence[BoxSource]) -> ShardsRestored | None:
        """Cut the state anew in the same world, after `step`, with all its ranks. Blocks.

        Each builds again and loads what it holds from then on. What `near` has comes from there,
        the rest from what was captured of `step`.

        Returns:
          What was loaded; None when the world ended meanwhile, and the next one begins from
          snapshots.
        """
        group, membership = self._parts.group, self._parts.membership
        assert self._build is not None, "asked for models that are built"
        assert self._snapshots is not None, "stepping"
        world = group.world
        try:
            self._snapshots.ensure(step, world)
            self._snapshots.give_up()
            self._began = time.monotonic()
            self._build(world)
            self._snapshots.restore(step, world, membership, admitted=True, near=near)
            self._agree()
        except (GenerationAborted, Incomplete) as error:
            group.abort(world.generation, str(error))
            return None
        return self._snapshots.loaded

    def _enter(self, entry: Entry) -> None:
        parts, world, step = self._parts, entry.world, entry.step
        stepping = self._snapshots is not None
        if stepping and world.generation > 1 and not entry.admitted:
            parts.injector.at(Point.RECOVERY, step + 1)
        held = parts.membership.step
        try:
            # Who does not come is evicted by the coordinator long before; its order ends this.
            parts.group.edit(world, timeout_s=10 * parts.stall_s)
        except (WireError, GenerationAborted, TimeoutError) as error:
            parts.group.abort(world.generation, str(error))
            cut = error.members if isinstance(error, Unreachable) else frozenset()
            parts.membership.refused(world, str(error), cut=cut)
            return
        parts.recorder.adopt(world.generation)
        # Before the step loop only the initial state counts as held: there is nothing else.
        has_it = held == step and step > 0 if stepping else step == 0
        has_it = has_it and not (stepping and self._build is not None)
        parts.membership.entered(world, step if has_it else None)
        if has_it and stepping and not self._settle_blocks(world, step):
            return
        if has_it and step > 0 and not (entry.admitted or self._in_step):
            # Shares of this step are gone with the members that are: take them anew.
            assert self._snapshots is not None, "stepping"
            self._snapshots.begin(step, world)
        if not stepping:
            self._owed = None if has_it else entry
        elif not has_it:
            self._restore(entry)

    def _restore(self, entry: Entry) -> None:
        """Take the state that `entry` stands at, from peers, memory or disk. Blocks."""
        parts, world, step = self._parts, entry.world, entry.step
        assert self._snapshots is not None, "stepping"
        self._began = time.monotonic()
        if not self._settle_blocks(world, None):
            return
        try:
            if self._build is not None:
                self._build(world)
            if step == 0:
                if self._blocks is not None and self._blocks.trained:
                    # What is here is no initial state, and nobody has one.
                    raise IntegrityError(
                        "parts of the optimizer's state are lost with all their holders, and no "
                        "snapshot in memory, parity or a checkpoint is whole: training begins anew, "
                        "in new processes. Keep parity on other nodes (--parity), or checkpoints "
                        "(--checkpoint-dir)"
                    )
                self._share_initial_state()
            else:
                patch = None
                if entry.approximation is not None:
                    patch = patch_of(entry.approximation, parts, self._layers)
                self._snapshots.restore(
                    step, world, parts.membership, admitted=entry.admitted, patch=patch
                )
            self._agree()
        except GenerationAborted:
            return
        except Incomplete as error:
            parts.group.abort(world.generation, str(error))
            return
        if parts.membership.restored(world.generation, step):
            parts.trace.event("admit", step=step, generation=world.generation)
            anew = self._build is not None or (self._blocks is not None and not entry.admitted)
            if step > 0 and anew:
                # In the shards of this world. Those of the one before are kept until all have it.
                self._snapshots.begin(step, world)

    def _settle_blocks(self, world: World, step: Step | None) -> bool:
        """Agree who owns which block of the optimizer's state; False: `world` has ended. Blocks.

        `step`: whose state this rank holds. Where blocks are lost with all their holders, what is
        left is of no use, and all begin from snapshots.
        """
        if self._blocks is None:
            return True
        assert self._snapshots is not None, "stepping"
        try:
            self._blocks.enter(world, step)
        except GenerationAborted:
            return False
        except BlocksLost as error:
            self._parts.trace.event(
                "blocks-lost", step=step, generation=world.generation, reason=str(error)
            )
            self._snapshots.give_up()
            self._parts.membership.forsake(world.generation, str(error))
            return False
        return True

    def _agree(self) -> None:
        """Tell all ranks the layout of this one's shards, and wait until they have loaded theirs.

        Before that nobody may overwrite what the others read.

        Raises:
          GenerationAborted: the generation ended meanwhile.
          UsageError: the ranks cannot come to the same bits.
        """
        if self._build is None:
            return
        assert self._snapshots is not None, "stepping"
        if self._layers is not None and self._layers.ends is not None:
            self._layers.ends.settle()
        mine = {
            "layout": self._snapshots.layout,
            "threads": torch.get_num_threads(),
            "seconds": time.monotonic() - self._began,
        }
        told = self._parts.group.exchange(json.dumps(mine).encode()).wait()
        said = [json.loads(one) for one in told]
        if len(threads := sorted({int(one["threads"]) for one in said})) > 1:
            raise UsageError(
                f"ranks compute with {threads} threads, and kernels sum by thread: call "
                "torch.set_num_threads() with the same number on all ranks"
            )
        self._snapshots.agree(int(one["layout"]) for one in said)
        self.switch_s = max(float(one["seconds"]) for one in said)

    def _share_initial_state(self) -> None:
        """Everybody starts from rank 0's parameters and buffers; shards are everybody's own."""
        group = self._parts.group
        if group.world.size == 1 or self._layers is not None:
            return
        for module in self._modules():
            for tensor in [*module.parameters(), *module.buffers()]:
                if not is_dtensor(tensor):
                    broadcast_from(group, tensor.detach())


def broadcast_from(group: Group, tensor: torch.Tensor, root: int = 0) -> None:
    """The `tensor` of rank `root` to all ranks, in place, whatever its strides and device. Blocks.

    Raises:
      GenerationAborted: the generation ended meanwhile.
    """
    # A model in channels_last has parameters that are not contiguous; the wire needs them so.
    flat = tensor.cpu().contiguous()
    group.broadcast(flat, root).wait()
    if flat is not tensor:
        tensor.copy_(flat)
