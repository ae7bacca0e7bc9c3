"""Snapshots: this rank's share of the state, captured at every commit, restored after a failure.

Ranks that hold the same state, by its layout, are replicas, and each captures one share of
it. Who holds what, every rank learns from the ballots of the last vote. The arena belongs to
the agent and outlives this process. It is made at the first commit, when the optimizer's
state exists and its size is known, with room for the share that is due after the loss of one
replica; when more are lost, the agent makes a larger one while training goes on.
"""

import logging
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from pathlib import Path

import torch

from ftkit.checkpoint.arena import Arena
from ftkit.checkpoint.capture import Capture
from ftkit.checkpoint.chunks import Share
from ftkit.checkpoint.copies import local_copies
from ftkit.checkpoint.fetch import list_copies
from ftkit.checkpoint.layout import StateLayout
from ftkit.checkpoint.restore import Restored, RestorePlan, execute, look_ahead, plan
from ftkit.checkpoint.slots import Pin
from ftkit.checkpoint.state import ProtectedState
from ftkit.core.errors import (
    AllPinned,
    CapacityError,
    GenerationAborted,
    IntegrityError,
    WireError,
)
from ftkit.core.ids import JobId, MemberId, NodeId, Seat, Step
from ftkit.core.inventory import Inventory
from ftkit.core.world import World
from ftkit.session.membership import Membership
from ftkit.session.parts import Parts

logger = logging.getLogger(__name__)

#: Between two looks for a snapshot that is still being captured by a peer.
LOOK_S = 0.002

#: A vote for step s passes once all have sealed this many steps before it: each of them has
#: gated the snapshot of step s - 2 before it committed step s - 1.
SEALED_BEHIND = 2


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
    ) -> None:
        """Take note of what is protected; nothing is captured before the first commit."""
        more = {f"model{i}": m for i, m in enumerate(model[1:], start=1)}
        self._state = ProtectedState(
            model=model[0],
            optimizer=list(optimizer),
            scheduler=() if scheduler is None else scheduler,  # type: ignore[arg-type]  # checked there
            **{**more, **extra},  # type: ignore[arg-type]  # checked there
        )
        self._env = parts.env
        self._control = parts.control
        self._trace = parts.trace
        self._holds: Mapping[MemberId, int] = {}
        self._layout: StateLayout | None = None
        self._capture: Capture | None = None
        self._arena: Arena | None = None
        self._begun = Step(0)
        self._larger: Future[Path] | None = None
        """The agent is making a larger arena."""

    @property
    def layout(self) -> int:
        """Digest of the layout of this rank's state: equal for replicas.

        Before the first commit the optimizers have no state, and the model speaks for them.
        """
        return int((self._layout or self._state.layout()).digest, 16)

    def heard(self, holds: Mapping[MemberId, int]) -> None:
        """Take note of every member's `layout`, as told in the last vote."""
        self._holds = holds

    def begin(self, step: Step, world: World) -> None:
        """Begin to capture this rank's share of `step`, the newest committed.

        A member that has been restored and has not voted yet takes no share.

        Raises:
          CapacityError: shared memory has no room for the arena.
          StateChanged: the state is not what it was.
        """
        if self._control is None or self._env is None:
            return
        member = MemberId(self._env.member)
        if member not in self._holds:
            return
        holds = {m: self._holds[m] for m in sorted(world.member_ids) if m in self._holds}
        replicas = [m for m, layout in holds.items() if layout == holds[member]]
        self._layout = self._state.picture().layout
        capture = self._ready(self._layout, len(replicas))
        if capture is None:
            self._trace.event("snapshot-skipped", step=step, reason="a larger arena is being made")
            return
        if step == self._begun:
            capture.abandon()  # the share due in an older world
        self._begun = step
        try:
            capture.begin(
                step,
                world.generation,
                share=Share(replicas.index(member), len(replicas)),
                layouts=len(set(holds.values())),
                complete=Step(step - SEALED_BEHIND),
                pins=self._pins(step),
            )
        except AllPinned as error:
            self._trace.event("snapshot-skipped", step=step, reason=str(error))

    def _pins(self, step: Step) -> list[Pin]:
        """The pins of a snapshot of `step`: whether it is due to go to disk.

        Marked from the start of its capture, so that it cannot be overwritten before the agent
        has seen it. The newest wins: one that has waited until now is due no more. While one
        is being written none is marked: the arena has one slot for it.
        """
        env, arena = self._env, self._arena
        assert env is not None, "asked by begin"
        assert arena is not None, "asked by begin"
        if not env.checkpoint_every or step % env.checkpoint_every:
            return []
        held = [(s, arena.pins(slot)) for slot, s in enumerate(arena.slots()) if s is not None]
        for sealed, pins in held:
            if pins[Pin.PERSIST] and sealed.step != step:
                self._trace.event(
                    "checkpoint-skipped",
                    step=step,
                    reason=f"step {sealed.step} is still being written",
                )
                return []
        for sealed, pins in held:
            if pins[Pin.DUE]:
                arena.pin(sealed, Pin.DUE, on=False)
        return [Pin.DUE]

    def gate(self) -> None:
        """Wait for what is left of the capture under way: the state is about to change."""
        if self._capture is not None:
            self._capture.gate()

    def look_ahead(self) -> None:
        """Do early what a restore does first, so that others wait less for this newcomer."""
        if self._env is None or self._control is None:
            return
        try:
            chosen = self._plan(None)
        except IntegrityError:
            return  # nothing is there yet
        look_ahead(chosen, secret=bytes.fromhex(self._env.secret))

    def restore(self, step: Step, world: World, membership: Membership, *, admitted: bool) -> None:
        """Load the state of `step` from the nearest arenas that hold it, or from disk.

        Blocks until the peers have sealed it, which takes them as long as a forward pass at
        most. Peers that let this rank in (`admitted`) hold it; otherwise a new world begins,
        and where no arena has the step, a checkpoint has.

        Raises:
          GenerationAborted: `world` ended meanwhile.
          StateChanged: this process built another model than the snapshot is of.
        """
        if self._env is None or self._control is None:
            raise IntegrityError("a rank that is alone has nothing to restore from")
        self._release()
        while True:
            if not membership.active or membership.generation != world.generation:
                raise GenerationAborted(f"generation {world.generation} ended during a restore")
            try:
                done = execute(
                    self._plan(step), self._state, secret=bytes.fromhex(self._env.secret)
                )
            except IntegrityError as error:
                logger.debug("step %s is not there yet: %s", step, error)
                from_disk = None if admitted else self._from_disk(step)
                if from_disk is None:
                    membership.wait_changed(LOOK_S)
                    continue
                done = from_disk
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

    def close(self) -> None:
        """Finish the snapshot under way and let go of the arena, which stays."""
        self._release()

    def _ready(self, layout: StateLayout, replicas: int) -> Capture | None:
        """The capture, with an arena that has room for a share; None while one is being made.

        The first arena is waited for, so that too little shared memory is known at once.
        """
        if self._capture is None:
            path = self._ask_arena(layout, replicas).result()
            self._arena = Arena.open(path, writable=True)
            self._capture = Capture(self._arena, self._state, self._trace.event)
        assert self._arena is not None, "a capture has an arena"
        if self._larger is not None and self._larger.done():
            self._enlarge(self._larger)
            self._larger = None
        if self._arena.fits_share(layout, replicas):
            return self._capture
        if self._larger is None:
            self._larger = self._ask_arena(layout, replicas)
        return None

    def _ask_arena(self, layout: StateLayout, replicas: int) -> Future[Path]:
        """Have the agent make an arena, with room for the share after one more loss."""
        assert self._control is not None, "asked for by begin"
        control, answer = self._control, Future[Path]()

        def ask() -> None:
            try:
                answer.set_result(Path(control.arena(layout.to_json(), max(1, replicas - 1))))
            except BaseException as error:  # noqa: BLE001 - whoever asks for the result raises it
                answer.set_exception(error)

        threading.Thread(target=ask, name="ftkit-arena", daemon=True).start()
        return answer

    def _enlarge(self, larger: Future[Path]) -> None:
        """Use the larger arena from now on, if there is one: training goes on without."""
        assert self._capture is not None, "there was one to enlarge"
        assert self._arena is not None, "there was one to enlarge"
        try:
            arena = Arena.open(larger.result(), writable=True)
        except (CapacityError, IntegrityError, OSError) as error:
            self._trace.event("snapshot-failed", error=str(error))
            return
        self._capture.rebind(arena)
        self._arena.close()
        self._arena = arena

    def _release(self) -> None:
        capture, self._capture = self._capture, None
        if capture is not None:
            capture.close()
        arena, self._arena = self._arena, None
        if arena is not None:
            arena.close()
        if self._larger is not None:
            wait([self._larger])  # the agent's answer must not reach who asks next
            self._larger = None
        self._layout = None

    def _from_disk(self, step: Step) -> Restored | None:
        """The checkpoint of `step`, which the coordinator has found to be whole, if any."""
        assert self._env is not None, "asked by a member of a job"
        if not self._env.checkpoint_dir:
            return None
        # Imported here: most ranks never read one, and pyarrow takes its time.
        from ftkit.session.from_disk import load_from_disk

        return load_from_disk(self._env.checkpoint_dir, step, Seat(self._env.seat), self._state)

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

    def _servers(self) -> dict[NodeId, tuple[str, int]]:
        assert self._env is not None, "asked by a member of a job"
        assert self._control is not None, "asked by a member of a job"
        return {
            NodeId(int(node)): (str(address[0]), int(address[1]))
            for node, address in self._control.stores.items()
            if int(node) != self._env.node
        }
