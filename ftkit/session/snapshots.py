"""Snapshots: this rank's state, captured at every commit and restored after a failure.

The arena belongs to the agent and outlives this process. It is made at the first commit,
when the optimizer's state exists and its size is known.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ftkit.checkpoint.arena import Arena
from ftkit.checkpoint.capture import Capture
from ftkit.checkpoint.fetch import list_copies
from ftkit.checkpoint.restore import execute, plan
from ftkit.checkpoint.state import ProtectedState
from ftkit.core.errors import GenerationAborted, IntegrityError, WireError
from ftkit.core.ids import Generation, NodeId, Seat, Step
from ftkit.core.inventory import Copy, Inventory
from ftkit.core.world import World
from ftkit.session.membership import Membership
from ftkit.session.parts import Parts

logger = logging.getLogger(__name__)

#: Between two looks for a snapshot that is still being captured by a peer.
LOOK_S = 0.002


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
        self._capture: Capture | None = None
        self._arena: Arena | None = None

    def begin(self, step: Step, generation: Generation) -> None:
        """Begin to capture the state of `step`, which was just committed.

        Raises:
          CapacityError: shared memory has no room for the arena.
          StateChanged: the state is not what it was.
        """
        if self._control is None:
            return
        if self._capture is None:
            layout = self._state.layout()
            self._arena = Arena.open(Path(self._control.arena(layout.to_json())), writable=True)
            self._capture = Capture(self._arena, self._state, self._trace.event)
        self._capture.begin(step, generation)

    def gate(self) -> None:
        """Wait for what is left of the capture under way: the state is about to change."""
        if self._capture is not None:
            self._capture.gate()

    def restore(self, step: Step, world: World, membership: Membership) -> None:
        """Load the state of `step` from the nearest arena that holds it.

        Blocks until a peer has sealed it, which takes it as long as its forward pass at most.

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
                chosen = plan(
                    self._inventory(step),
                    seat=Seat(self._env.seat),
                    node=NodeId(self._env.node),
                    servers=self._servers(),
                    step=step,
                )
                done = execute(chosen, self._state, secret=bytes.fromhex(self._env.secret))
            except IntegrityError as error:
                logger.debug("step %s is not there yet: %s", step, error)
                membership.wait_changed(LOOK_S)
                continue
            self._trace.event(
                "restore",
                step=step,
                generation=world.generation,
                source=str(done.source),
                seconds=done.seconds,
                bytes=done.bytes,
            )
            return

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

    def _inventory(self, step: Step) -> Inventory:
        """What this node holds, and the others too when `step` is not here."""
        assert self._env is not None, "asked by restore"
        copies = []
        for path in sorted(Path(self._env.shm_dir).glob("*.arena")):
            try:
                with Arena.open(path) as arena:
                    copies += [
                        Copy(
                            seat=Seat(int(path.stem.rsplit("-", 1)[-1])),
                            node=NodeId(self._env.node),
                            path=str(path),
                            step=sealed.step,
                            generation=sealed.generation,
                        )
                        for sealed in arena.snapshots()
                    ]
            except (IntegrityError, OSError):
                continue  # being made, or damaged: it holds nothing that counts
        if not any(copy.step == step for copy in copies):
            secret = bytes.fromhex(self._env.secret)
            for node, address in self._servers().items():
                try:
                    copies += list_copies(address, secret, node)
                except WireError as error:
                    logger.debug("node %s does not answer: %s", node, error)
        return Inventory(copies=tuple(copies))

    def _servers(self) -> dict[NodeId, tuple[str, int]]:
        assert self._env is not None, "asked by restore"
        assert self._control is not None, "asked by restore"
        return {
            NodeId(int(node)): (str(address[0]), int(address[1]))
            for node, address in self._control.stores.items()
            if int(node) != self._env.node
        }
