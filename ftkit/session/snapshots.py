"""Snapshots: this rank's share of the state, captured at every commit, restored after a failure.

All members of a world hold the same state (the vote sees to it), and each captures one share:
which, is a function of the world alone. The arena belongs to the agent and outlives this
process. It is made at the first commit, when the optimizer's state exists and its size is
known, with pages for the share that is due after the loss of one member; when more are lost,
the capture gets its further pages before it copies.
"""

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch

from ftkit.checkpoint.arena import Arena
from ftkit.checkpoint.capture import Capture
from ftkit.checkpoint.chunks import WHOLE, Share
from ftkit.checkpoint.copies import local_copies
from ftkit.checkpoint.fetch import list_copies
from ftkit.checkpoint.layout import StateLayout
from ftkit.checkpoint.numa import node_of_gpu
from ftkit.checkpoint.ports import BoxSource
from ftkit.checkpoint.restore import Restored, RestorePlan, execute, look_ahead, plan
from ftkit.checkpoint.restore_shards import (
    Incomplete,
    Patch,
    ShardsRestored,
    open_copy,
    restore_shards,
    whole_layout,
)
from ftkit.checkpoint.shadow import Owned
from ftkit.checkpoint.sources import SnapshotSource
from ftkit.checkpoint.state import ProtectedState
from ftkit.checkpoint.walk import dtype_name
from ftkit.core.errors import (
    AllPinned,
    CapacityError,
    FtkitError,
    GenerationAborted,
    IntegrityError,
    WireError,
)
from ftkit.core.ids import JobId, MemberId, NodeId, Seat, Step
from ftkit.core.inventory import Copy, Inventory
from ftkit.core.world import World
from ftkit.recovery.saving import Schedule
from ftkit.session.due import DueMark
from ftkit.session.membership import Membership
from ftkit.session.parts import Parts
from ftkit.session.stateful import Places

logger = logging.getLogger(__name__)

#: Between two looks for a snapshot that is still being captured by a peer.
LOOK_S = 0.002

#: In multiples of `max_stall_s`: a peer that stopped before it sealed is named within one.
PATIENCE_WITH_PEERS = 2.0

#: A vote for step s passes once all have sealed this many steps before it: each of them has
#: gated the snapshot of step s - 2 before it committed step s - 1.
SEALED_BEHIND = 2

#: What the loader's place is called in the small state.
_LOADER = "loader"


class Division(Protocol):
    """How the state of an optimizer is divided among ranks that hold the model whole."""

    @property
    def layouts(self) -> int:
        """How many different parts of the state the ranks capture."""

    @property
    def torn(self) -> bool:
        """Whether this rank's part is in doubt, and not to be captured."""


class Snapshots:
    """Captures and restores. Used by the training thread; the copying has its own."""

    def __init__(
        self,
        *,
        model: Sequence[torch.nn.Module],
        optimizer: Sequence[torch.optim.Optimizer],
        scheduler: object | None,
        extra: Mapping[str, object],
        parts: Parts,
        stages: bool = False,
    ) -> None:
        """Take note of what is protected; nothing is captured before the first commit.

        Without a model the state is sharded: `adopt` brings one for each world. `stages`: each
        rank holds other tensors, rather than a part of each.
        """
        self._stages = stages
        self._extra = extra
        self._places: Places | None = None
        self._sharded = not model
        self._layouts: frozenset[int] = frozenset()
        """Digests of all ranks' layouts, where the state is sharded."""
        self._division: Division | None = None
        self._alike = 0
        self.moved = 0
        """Bytes loaded from arenas of other seats, in all loads."""
        self._whole: tuple[StateLayout, int] | None = None
        """A layout, and the digest of what it is a part of."""
        self._state: ProtectedState
        if model:
            self._protect(model, optimizer, scheduler)
        self._env = parts.env
        self._control = parts.control
        self._trace = parts.trace
        self._layout: StateLayout | None = None
        self._due = DueMark(self._goes_to_disk, self._trace.event)
        self._capture: Capture | None = None
        self._arena: Arena | None = None
        self.restores = 0
        """How often the live state was replaced."""
        self._begun = Step(0)
        self.loaded: ShardsRestored | None = None
        """What the last load of shards did."""
        self._optimizers: Sequence[torch.optim.Optimizer] = optimizer
        self._complete = Step(0)
        """A step known to be complete on all ranks: where this one was restored."""

    def _protect(
        self,
        model: Sequence[torch.nn.Module],
        optimizer: Sequence[torch.optim.Optimizer],
        scheduler: object | None,
    ) -> None:
        more = {f"model{i}": m for i, m in enumerate(model[1:], start=1)}
        self._state = ProtectedState(
            model=model[0],
            optimizer=list(optimizer),
            scheduler=() if scheduler is None else scheduler,  # type: ignore[arg-type]  # checked there
            **{**more, **self._extra},  # type: ignore[arg-type]  # checked there
        )
        if self._places is not None:
            self._state.also(_LOADER, self._places)

    def keep_places(self, places: Places) -> None:
        """Keep with each step the place of the loader that its batches come from."""
        self._places = places
        if not self._sharded:
            self._state.also(_LOADER, places)

    def protects(self, value: object) -> bool:
        """Whether `value` is one of the further objects given to `protect`."""
        return any(value is other for other in self._extra.values())

    def adopt(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: object | None,
        beside: Mapping[str, torch.Tensor] = {},
    ) -> None:
        """Protect what was built for another world, from here on. Its layout is not agreed yet.

        `beside`: copies of what others hold, to be captured with it and never loaded.
        """
        assert self._sharded, "whole state stays the same objects"
        self._release()
        self._protect([model], [optimizer], scheduler)
        self._state.beside(beside)
        self._optimizers = [optimizer]
        self._layout, self._layouts = self._state.layout(), frozenset()

    def divide(self, division: Division) -> None:
        """Every rank captures a part of its own from here on, though all hold the model whole."""
        self._division = division
        parts = self._state.whole()
        whole = StateLayout.of((n, dtype_name(t), tuple(t.shape)) for n, t in sorted(parts.items()))
        self._alike = int(whole.digest, 16)

    def look_again(self) -> None:
        """This rank captures another part of the state from now on."""
        self._state.look_again()

    def names_of(
        self, optimizer: torch.optim.Optimizer, parameter: torch.Tensor
    ) -> tuple[str, str]:
        """The name of a parameter in snapshots, and what the names of its state begin with."""
        name = self._state.parameter_name(parameter)
        return name, f"{self._state.optimizer_name(optimizer)}/state/{name}/"

    def agree(self, layouts: Iterable[int]) -> None:
        """These are the layouts of all ranks, in order. Ignored where all hold the same."""
        if self._sharded:
            self._layouts = frozenset(layouts)

    @property
    def layout(self) -> int:
        """Digest of the layout of the last step captured or restored here; 0 before the first.

        Where ranks capture other parts of what they have alike, of what they have alike.
        """
        if self._division is not None:
            return self._alike
        return int(self._layout.digest, 16) if self._layout else 0

    @property
    def shape(self) -> int:
        """Digest of what all ranks must have alike: names and shapes, however they are cut.

        0 where they have nothing alike.
        """
        if self._stages:
            return 0
        if not self._sharded or self._layout is None:
            return self.layout
        if self._whole is None or self._whole[0] is not self._layout:
            self._whole = self._layout, int(whole_layout(self._layout).digest, 16)
        return self._whole[1]

    def begin(self, step: Step, world: World) -> None:
        """Begin to capture this rank's share of `step`, the newest committed.

        Raises:
          CapacityError: shared memory has no room for the arena.
          StateChanged: the state is not what it was.
        """
        if self._control is None or self._env is None:
            return
        rank = world.rank_of(MemberId(self._env.member))
        assert rank is not None, "a member captures"
        if self._places is not None:
            # An attempt at the next step may have read on since.
            self._places.step = step
        share = Share(rank, world.size)
        if self._sharded:
            share = WHOLE  # of replicas, too: one is enough when the other's node is lost
            if not self._is_agreed():
                reason = "optimizer state appeared: the ranks agree on it in the next vote"
                self._trace.event("snapshot-skipped", step=step, reason=reason)
                return
        elif self._division is not None:
            share = WHOLE
            if self._division.torn:
                return  # it is captured as the next world is entered
        if self._capture is None:
            self._arena = self._make_arena(self._state.picture().layout, world, share)
            self._capture = Capture(self._arena, self._state, self._trace.event)
        if step == self._begun:
            self._capture.abandon()  # the share due in an older world
        self._begun = step
        try:
            self._start(step, world, share)
        except CapacityError:
            # The state has grown: optimizer state that appears late, modules that were added.
            layout, outgrown = self._capture.layout, self._arena
            assert layout is not None, "it is what did not fit"
            assert outgrown is not None, "made with the capture"
            self._due.undo(outgrown)
            if outgrown.fits(layout):
                raise
            self._arena = self._make_arena(layout, world, share)
            self._capture.rebind(self._arena)
            outgrown.close()
            self._start(step, world, share)
        self._layout = self._capture.layout

    def _start(self, step: Step, world: World, share: Share) -> None:
        assert self._capture is not None, "made with the arena"
        assert self._arena is not None, "made with the capture"
        try:
            self._capture.begin(
                step,
                world.generation,
                share=share,
                layouts=self._division.layouts if self._division else len(self._layouts) or 1,
                complete=max(Step(step - SEALED_BEHIND), self._complete),
                pins=self._due.pins(self._arena, step),
            )
        except AllPinned as error:
            # This rank's alone: the step is complete nowhere, and counts for nobody.
            self._due.undo(self._arena)
            self._trace.event("snapshot-skipped", step=step, reason=str(error))

    def _make_arena(self, layout: StateLayout, world: World, share: Share) -> Arena:
        """This seat's arena, with room for `layout`; the snapshots it held before are kept."""
        assert self._control is not None, "asked by a member of a job"
        room = self._state.room() if self._division else layout
        if self._sharded:
            room = whole_layout(layout)
        path = self._control.arena(
            room.to_json(), _replicas_after_a_loss(world), gpu_node=_gpu_node()
        )
        arena = Arena.open(Path(path), writable=True)
        arena.reserve(share.bytes_max(layout.total_bytes, arena.geometry.chunk_bytes))
        return arena

    def _goes_to_disk(self, step: Step) -> bool:
        """Whether `step` is due: by what the job has decided, else by the interval it was given."""
        decided = self._control.saves if self._control is not None else None
        if decided is None:
            decided = Schedule(every=self._env.checkpoint_every if self._env else 0)
        return decided.due(step)

    def _is_agreed(self) -> bool:
        """Whether all ranks know of the layout that the state has now."""
        self._layout = self._state.picture().layout
        return self.layout in self._layouts

    def gate(self) -> None:
        """Wait for what is left of the capture under way: the state is about to change."""
        if self._capture is None:
            return
        try:
            self._capture.gate()
        except CapacityError as error:
            logger.warning("a snapshot is lost, training goes on: %s", error)

    def replicated(self, *, steady: bool = False) -> dict[str, torch.Tensor]:
        """The live tensors that every rank holds whole, by name.

        `steady` leaves out what may change outside the optimizer's step, such as buffers.
        """
        if self._division is not None:
            return self._state.whole(steady=steady)
        live = self._state.picture().live
        return {
            item.name: item.tensor
            for item in live
            if item.global_shape == item.tensor.shape and not (steady and item.early)
        }

    def steady(self) -> dict[str, torch.Tensor]:
        """What this rank holds of the live tensors that nothing but the optimizer's step changes."""
        return {item.name: item.tensor for item in self._state.picture().live if not item.early}

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The first one that is protected."""
        return self._optimizers[0]

    @property
    def arena(self) -> Path | None:
        """Where this rank captures to; None before it does."""
        return self._arena.path if self._arena else None

    def owned(self, modules: Sequence[torch.nn.Module], optimizer: torch.optim.Optimizer) -> Owned:
        """What is protected of some modules, in order to move it. UsageError: it cannot move."""
        return Owned.of(self._state, modules, optimizer)

    def look_ahead(self, world: World) -> bool:
        """Do early what a newcomer to `world` needs, so that the others wait less for it.

        Returns whether there was something to look at.
        """
        if self._env is None or self._control is None or self._division is not None:
            return False
        try:
            layout = look_ahead(self._plan(None), secret=bytes.fromhex(self._env.secret))
            room = whole_layout(layout) if self._sharded else layout
            self._control.arena(room.to_json(), _replicas_after_a_loss(world), gpu_node=_gpu_node())
        except (IntegrityError, CapacityError) as error:
            logger.debug("nothing to look at yet: %s", error)
            return False
        return True

    def restore(
        self,
        step: Step,
        world: World,
        membership: Membership,
        *,
        admitted: bool,
        near: Sequence[BoxSource] = (),
        patch: Patch | None = None,
    ) -> None:
        """Load the state of `step` from the nearest arenas that hold it, or from disk.

        Blocks until the peers have sealed it, which takes them as long as a forward pass. Peers
        that let this rank in (`admitted`) hold it; otherwise a new world begins, and where no
        arena has the step, a checkpoint has. Parts that turn out to be damaged are struck from
        this node's arenas. Of sharded state `near` holds some of `step` already, and `patch` makes
        up for what nobody holds.

        Raises:
          GenerationAborted: `world` ended meanwhile.
          Incomplete: of sharded state; a part was damaged, and there is no other. Another step must
            be chosen.
          IntegrityError: after `max_stall_s` the step is still not whole; where peers are to seal
            it, after twice that, for the one that does not is found and replaced before.
          StateChanged: this process built another model than the snapshot is of.
        """
        if self._env is None or self._control is None:
            raise IntegrityError("a rank that is alone has nothing to restore from")
        self._release()
        self.restores += 1
        patience = PATIENCE_WITH_PEERS if admitted else 1.0
        deadline = time.monotonic() + patience * self._env.max_stall_s
        damaged, in_parts = False, self._sharded or self._division is not None
        while True:
            if not membership.active or membership.generation != world.generation:
                raise GenerationAborted(f"generation {world.generation} ended during a restore")
            try:
                if in_parts:
                    self._load_shards(step, world, near, patch)
                    return
                done = execute(
                    self._plan(step), self._state, secret=bytes.fromhex(self._env.secret)
                )
            except IntegrityError as error:
                if damaged and isinstance(error, Incomplete):
                    raise  # it was whole until we found bytes that are not what was sealed
                damaged = damaged or (in_parts and not isinstance(error, Incomplete))
                if time.monotonic() > deadline:
                    raise IntegrityError(str(error)) from error
                logger.debug("step %s is not there yet: %s", step, error)
                from_disk = None if admitted else self._from_disk(step)
                if from_disk is None:
                    membership.wait_changed(LOOK_S)
                    continue
                done = from_disk
            self._layout, self._complete = done.layout, step
            self._trace.event(
                "restore",
                step=step,
                generation=world.generation,
                source=", ".join(dict.fromkeys(str(read.source) for read in done.reads))
                or self._env.checkpoint_dir,
                seconds=done.seconds,
                bytes=done.bytes,
            )
            return

    def _load_shards(
        self, step: Step, world: World, near: Sequence[BoxSource], patch: Patch | None
    ) -> None:
        """Load what this rank holds in `world`, as `restore_shards`. IntegrityError: it cannot."""
        assert self._env is not None, "asked by a member of a job"
        done = restore_shards(
            self._inventory(step),
            self._state,
            step=step,
            seat=Seat(self._env.seat),
            node=NodeId(self._env.node),
            servers=self._servers(),
            secret=bytes.fromhex(self._env.secret),
            stages=self._stages,
            near=near,
            patch=patch,
        )
        self.loaded = done
        self.moved += done.moved
        self._layout, self._complete = done.layout, step
        self._trace.event(
            "restore",
            step=step,
            generation=world.generation,
            source=", ".join(done.sources),
            seconds=done.seconds,
            bytes=done.bytes,
            moved=done.moved,
            **({} if patch is None else {"approximate": done.patched}),
        )

    def give_up(self) -> None:
        """Finish what can be finished of the snapshot under way, and let go of the arena.

        From here on nothing in this rank's arena changes, until another world begins to capture.
        """
        try:
            self.gate()
        except (FtkitError, OSError, RuntimeError) as error:
            logger.warning("a snapshot is lost: %s", error)  # capture has let go of it
        self._release()

    def ensure(self, step: Step, world: World) -> None:
        """Have this rank's shard of `step` in its arena, as soon as the tiers below let go of one.

        Raises:
          GenerationAborted: they did not within `max_stall_s`.
        """
        if self._control is None or self._env is None:
            return
        deadline = time.monotonic() + self._env.max_stall_s
        while True:
            self.gate()
            if self._capture is not None and self._capture.last is not None:
                last = self._capture.last
                if (last.step, last.generation) == (step, world.generation):
                    return
            if time.monotonic() > deadline:
                raise GenerationAborted(f"step {step} could not be captured")
            self.begin(step, world)
            time.sleep(LOOK_S)

    def close(self) -> None:
        """Finish the snapshot under way and let go of the arena, which stays."""
        self._release()

    def _release(self) -> None:
        capture, self._capture = self._capture, None
        if capture is not None:
            capture.close()
        arena, self._arena = self._arena, None
        if arena is not None:
            arena.close()

    def _from_disk(self, step: Step) -> Restored | None:
        """The checkpoint of `step`, which the coordinator has found to be whole, if any."""
        assert self._env is not None, "asked by a member of a job"
        if not self._env.checkpoint_dir:
            return None
        # Imported here: most ranks never read one, and pyarrow takes its time.
        from ftkit.session.from_disk import load_from_disk

        return load_from_disk(
            self._env.checkpoint_dir, step, Seat(self._env.seat), self._state, stages=self._stages
        )

    def _plan(self, step: Step | None) -> RestorePlan:
        """Where to read `step`, or the newest one, from. IntegrityError: it is not complete."""
        assert self._env is not None, "asked by a member of a job"
        return plan(
            self._inventory(step),
            seat=Seat(self._env.seat),
            node=NodeId(self._env.node),
            servers=self._servers(),
            step=step,
        )

    def _inventory(self, step: Step | None) -> Inventory:
        """What this node holds, and the others too when `step` (any step) is not all here."""
        assert self._env is not None, "asked by a member of a job"
        node = NodeId(self._env.node)
        copies = local_copies(JobId(self._env.job), Path(self._env.shm_dir), node)
        complete = Inventory(copies=tuple(copies)).complete()
        if not complete if step is None else step not in complete:
            secret = bytes.fromhex(self._env.secret)
            for other, address in self._servers().items():
                try:
                    copies += list_copies(address, secret, other)
                except WireError as error:
                    logger.debug("node %s does not answer: %s", other, error)
        return Inventory(copies=tuple(copies))

    def copies_of(self, seat: Seat, node: NodeId) -> list[Copy]:
        """What the arena of a seat on a node holds. Any thread; WireError: its node does not answer."""
        assert self._env is not None, "asked by a member of a job"
        if node == self._env.node:
            found = local_copies(JobId(self._env.job), Path(self._env.shm_dir), node)
        else:
            address = self._servers().get(node)
            found = list_copies(address, bytes.fromhex(self._env.secret), node) if address else []
        return [copy for copy in found if copy.seat == seat]

    def opened(self, copy: Copy) -> AbstractContextManager[SnapshotSource]:
        """A copy to read from. Any thread; raises as `open_copy`."""
        assert self._env is not None, "asked by a member of a job"
        server = None if copy.node == self._env.node else self._servers()[copy.node]
        return open_copy(copy, server, bytes.fromhex(self._env.secret), 10.0)

    def _servers(self) -> dict[NodeId, tuple[str, int]]:
        assert self._env is not None, "asked by a member of a job"
        assert self._control is not None, "asked by a member of a job"
        return {
            NodeId(int(node)): (str(address[0]), int(address[1]))
            for node, address in self._control.stores.items()
            if int(node) != self._env.node
        }


def _gpu_node() -> int | None:
    """The memory node that this rank's GPU hangs on; None without one, or where nobody knows."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return None
    gpu: Any = torch.cuda.get_device_properties(torch.cuda.current_device())
    try:
        address = f"{gpu.pci_domain_id:04x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}.0"
    except AttributeError:  # not every build of torch tells
        return None
    return node_of_gpu(address)


def _replicas_after_a_loss(world: World) -> int:
    """Among how many the state is shared out once one member is lost."""
    return max(1, world.size - 1)
