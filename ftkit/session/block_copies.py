"""Block copies: this rank becomes the stand-in of a block while training goes on.

What is read, beside training, is the block as its owner has sealed it in its arena, some step ago. The
gradients given since are those of this rank too: they are kept, and given to a twin of the optimizer,
which comes to the owner's bits. That is proved before anything is used: the twin's rows must be those
that the owner has handed to all.
"""

import logging
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn

from ftkit.checkpoint.cut_walk import Piece
from ftkit.checkpoint.shadow import Hyper, fill, hash_of, hyper_of, twin_of
from ftkit.checkpoint.sources import SnapshotSource
from ftkit.core.errors import IntegrityError, StateChanged, WireError
from ftkit.core.ids import NodeId, Seat, Step
from ftkit.core.world import World
from ftkit.session.snapshots import Snapshots
from ftkit.session.zero import State, ZeroOptimizer, gradient_of

logger = logging.getLogger(__name__)

#: Blocks that are awaited at a time: of each, the gradients are kept meanwhile.
AT_ONCE = 2
#: Steps for which they are kept; then what comes later is waited for.
KEPT_MAX = 8
#: Between two looks for a snapshot that is still being sealed.
LOOK_S = 0.01
#: Niceness of the thread that reads.
NICE = 10


class Found(NamedTuple):
    """A block as it was sealed."""

    step: Step
    rows: list[torch.Tensor]
    """Of its pieces, in order."""
    states: list[dict[str, torch.Tensor]]


@dataclass(eq=False, slots=True)
class _Awaited:
    block: int
    source: Seat
    pieces: tuple[Piece, ...]
    since: Step
    """The step after which gradients are kept."""
    kept: list[tuple[Step, Hyper, list[torch.Tensor | None]]] = field(default_factory=list)
    found: Found | None = None


class BlockCopies:
    """Of one rank. All but the reading is the training thread's."""

    def __init__(self, optimizer: ZeroOptimizer, snapshots: Snapshots) -> None:
        """Nothing is wanted, and no thread runs, yet."""
        self._optimizer, self._snapshots = optimizer, snapshots
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closing = False
        self._nodes = dict[Seat, NodeId]()
        self._wanted = dict[int, Seat]()
        # ---- under the lock ----
        self._awaited = dict[int, _Awaited]()
        self.bytes = 0
        """Read from others' arenas so far."""

    def want(self, wanted: Mapping[int, Seat], world: World, step: Step) -> None:
        """Get these blocks from the arenas of the seats named; forget about all others.

        Args:
          wanted: blocks that this rank does not hold.
          world: the present one.
          step: just taken.
        """
        self._nodes = {m.seat: m.node for m in world.members}
        self._wanted = dict(wanted)
        with self._changed:
            for block in [b for b in self._awaited if b not in wanted]:
                del self._awaited[block]
        self._begin(step)

    def keep(self, step: Step) -> None:
        """The optimizer is about to take `step` with the gradients that are there."""
        if not self._awaited:
            return
        hyper = hyper_of(self._optimizer.inner)
        for one in list(self._awaited.values()):
            if len(one.kept) >= KEPT_MAX and one.found is None:
                one.kept.clear()
                one.since = Step(step - 1)
            gradients = [gradient_of(piece) for piece in one.pieces]
            one.kept.append((step, hyper, [g if g is None else g.clone() for g in gradients]))

    def take(self, step: Step) -> list[int]:
        """Adopt the blocks that have come, now that `step` is taken and all rows are here."""
        with self._changed:
            come = [one for one in self._awaited.values() if one.found is not None]
        adopted = list[int]()
        for one in come:
            states = self._replayed(one)
            with self._changed:
                if states is None:  # too old, or not what it should be: look for another
                    one.found, one.since = None, step
                    one.kept.clear()
                    self._changed.notify_all()
                    continue
                del self._awaited[one.block]
                del self._wanted[one.block]
            self._optimizer.adopt(one.block, states)
            adopted.append(one.block)
        if adopted:
            self._begin(step)
        return adopted

    def close(self) -> None:
        """End the thread. May be called twice."""
        with self._changed:
            self._closing = True
            self._awaited.clear()
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _begin(self, step: Step) -> None:
        """Await a few of those that are wanted."""
        with self._changed:
            for block, source in self._wanted.items():
                if block in self._awaited:
                    self._awaited[block].source = source
                elif len(self._awaited) < AT_ONCE:
                    pieces = tuple(p for p in self._optimizer.pieces if p.block == block)
                    self._awaited[block] = _Awaited(block, source, pieces, step)
            if self._awaited and self._thread is None and not self._closing:
                self._thread = threading.Thread(
                    target=self._run, name="ftkit-block-copies", daemon=True
                )
                self._thread.start()
            self._changed.notify_all()

    def _replayed(self, one: _Awaited) -> Sequence[State] | None:
        """The state of each piece now; None when it does not lead to the rows that are here."""
        found = one.found
        assert found is not None, "asked of what has come"
        if found.step < one.since:
            return None
        twin = twin_of(self._optimizer.inner)
        where = {
            id(p): number
            for number, group in enumerate(self._optimizer.param_groups)
            for p in group["params"]
        }
        rows = [nn.Parameter(tensor) for tensor in found.rows]
        for piece, mine, state in zip(one.pieces, rows, found.states, strict=True):
            twin.param_groups[where[id(piece.parameter)]]["params"].append(mine)
            if state:
                twin.state[mine] = state
        for step, hyper, gradients in one.kept:
            if step <= found.step:
                continue
            for group, values in zip(twin.param_groups, hyper, strict=True):
                group.update(values)
            for mine, gradient in zip(rows, gradients, strict=True):
                mine.grad = gradient
            # Not the instance's own, which a scheduler may have wrapped.
            type(twin).step(twin)
        for piece, mine in zip(one.pieces, rows, strict=True):
            if hash_of(mine) != hash_of(piece.rows):
                logger.warning(
                    "block %d of step %d came out otherwise than its owner has it: read again",
                    one.block,
                    found.step,
                )
                return None
        return [dict(twin.state.get(mine, {})) for mine in rows]

    def _run(self) -> None:
        """(thread) Read what is awaited, one block after another."""
        # Linux counts niceness by thread.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        while True:
            with self._changed:
                while not self._closing and not self._missing():
                    self._changed.wait()
                if self._closing:
                    return
                todo = self._missing()
            came = False
            for one in todo:
                found = self._look(one)
                with self._changed:
                    if found is not None and self._awaited.get(one.block) is one:
                        one.found, came = found, True
            with self._changed:
                if not came and not self._closing:
                    self._changed.wait(LOOK_S)

    def _missing(self) -> list[_Awaited]:
        return [one for one in self._awaited.values() if one.found is None]

    def _look(self, one: _Awaited) -> Found | None:
        """(thread) The block as its owner has sealed it last; None when it has not yet."""
        try:
            copies = self._snapshots.copies_of(one.source, self._nodes[one.source])
            for copy in sorted(copies, key=lambda c: (-c.step, -c.generation)):
                if copy.step < one.since:
                    break
                with self._snapshots.opened(copy) as source:
                    found = self._read(one, source, copy.step)
                if found is not None:
                    return found
        except (IntegrityError, WireError, StateChanged, OSError) as error:
            # Overwritten meanwhile, or its node does not answer.
            logger.debug("block %d cannot be read yet: %s", one.block, error)
        return None

    def _read(self, one: _Awaited, source: SnapshotSource, step: Step) -> Found | None:
        held = [(e.name, e.dtype, e.box) for e in source.entries()]
        rows, states, read = list[torch.Tensor](), list[dict[str, torch.Tensor]](), 0
        for piece in one.pieces:
            name, prefix = self._snapshots.names_of(self._optimizer, piece.parameter)
            if not any(e[0] == name and e[2] == piece.box for e in held):
                return None  # captured before it owned the block
            state = dict[str, torch.Tensor]()
            for full, dtype, box in held:
                mine = full == name or full.startswith(prefix)
                if not mine or (box.shape and box != piece.box):
                    continue
                data = bytearray(box.elements * getattr(torch, dtype).itemsize)
                source.read(full, box, memoryview(data))
                read += len(data)
                device = "cpu" if full == prefix + "step" else piece.rows.device
                tensor = torch.empty(box.shape, dtype=getattr(torch, dtype), device=device)
                fill(tensor, memoryview(data))
                if full == name:
                    rows.append(tensor)
                else:
                    state[full.removeprefix(prefix)] = tensor
            states.append(state)
        with self._changed:
            self.bytes += read
        return Found(step, rows, states)
