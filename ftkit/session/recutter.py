"""Recutter: has the layers of a pipeline move between ranks while the job trains.

Joins the pure parts (`recut_trigger` says when, `migration` what a vote makes of it) with those that
carry (`move_line`, `checkpoint.shadow`). All ranks go through the same stages at the same votes::

    IDLE --cut proposed--> ASKED --all agree--> MOVING --all READY--> switch, between two steps --> IDLE
                             |                    |
                             +----- dropped ------+--> IDLE

What the switch loads comes from memory, whatever became of the lines: layers whose shadow was proved
from the shadow, everything else from the arenas of that step, as after a failure. So a line that broke,
a slow target or a wrong bit cost time, never state.
"""

import contextlib
import json
import logging
import time
from collections.abc import Sequence
from enum import StrEnum, auto
from functools import partial
from typing import Any

import torch

from ftkit.checkpoint.shadow import Hyper, Moving, Owned, Shadow, hash_of, hyper_of
from ftkit.collectives.frames import CONTROL_BYTES_MAX
from ftkit.core.errors import GenerationAborted, ProtocolError, UsageError
from ftkit.core.fault_plan import Point
from ftkit.core.ids import Step
from ftkit.recovery.migration import Ruling, Said, Stand, ruling
from ftkit.recovery.recut_trigger import Proposal, RecutTrigger
from ftkit.recovery.vote import Ballot
from ftkit.session.layers import Layers
from ftkit.session.move_line import Incoming, Outgoing, Sent, copy_out
from ftkit.session.parts import Parts
from ftkit.session.snapshots import Snapshots
from ftkit.session.worlds import Worlds

logger = logging.getLogger(__name__)

#: Names of tensors that an event lists.
TOLD_MAX = 20
#: How many times as long as the last time a switch may take before a rank in it is taken for hung.
BUILD_TIMES = 4


class Phase(StrEnum):
    """See the module."""

    IDLE = auto()
    ASKED = auto()
    MOVING = auto()


class Recutter:
    """Of one step loop; the training thread's."""

    def __init__(
        self, parts: Parts, layers: Layers, snapshots: Snapshots, worlds: Worlds, *, slots: int
    ) -> None:
        """No cut is in force yet."""
        self._parts, self._layers, self._snapshots, self._worlds = parts, layers, snapshots, worlds
        self._trigger = RecutTrigger(slots=slots)
        self._switching = False
        self._clear()
        layers.on_cut = self._cut

    def _clear(self) -> None:
        self._phase = Phase.IDLE
        self._proposal: Proposal | None = None
        self._due: Ruling | None = None
        self._votes = 0
        self._began, self._began_step = 0.0, 0
        self._owned: list[tuple[Owned, Outgoing]] = []
        self._incoming: list[Incoming] = []
        self._taken: list[tuple[torch.Tensor | None, ...]] | None = None
        """Gradients of this step's moving parameters, once an optimizer was about to use them."""
        self._hyper: Hyper | None = None
        self._failed = ""

    # With the vote.

    @property
    def move(self) -> int:
        """For the ballot: the migration this rank takes part in."""
        return self._proposal.id if self._proposal else 0

    def stand(self, step: int) -> Stand:
        """For the ballot on `step`: how this rank stands in it."""
        if self._phase is Phase.IDLE:
            return Stand.NONE
        self._failed = self._failed or next((x.failed for x in self._lines if x.failed), "")
        if self._failed:
            return Stand.FAILED
        here = self._phase is Phase.MOVING and all(i.applied >= step - 1 for i in self._incoming)
        return Stand.READY if here else Stand.MOVING

    def counted(self, step: int, ballots: Sequence[Ballot], *, until: int, growing: bool) -> None:
        """The vote on `step` passed, with these ballots.

        Args:
          step: voted on.
          ballots: of all ranks, in order.
          until: the step at which the loop ends.
          growing: newcomers are let in after this step.
        """
        joining = growing or any(b.prepared for b in ballots)
        if self._proposal is None:
            self._proposal = self._trigger.hear(
                step,
                [b.costs for b in ballots],
                remaining=until - step,
                switch_s=self._worlds.switch_s,
                busy=joining or self._layers.on_gpu or any(b.move for b in ballots),
            )
            self._phase = Phase.ASKED if self._proposal else Phase.IDLE
            return
        said = [Said(b.move, b.stand, bool(b.prepared) or growing) for b in ballots]
        self._votes += 1
        found, reason = ruling(self._proposal.id, said, votes=self._votes)
        if found is Ruling.DROP:
            self.abandon(reason if not self._failed else f"{reason}: {self._failed}")
        elif self._phase is Phase.ASKED or found is Ruling.SWITCH:
            self._due = found

    # With the step.

    def before_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer is about to change what it holds by the gradients as they are now."""
        if self._phase is not Phase.MOVING:
            return
        if self._taken is not None:
            self._failed = "optimizers step more than once in a step"
            return
        self._hyper = hyper_of(optimizer) if self._incoming else None
        self._taken = [
            tuple(None if p.grad is None else p.grad.detach().clone() for p in owned.trained)
            for owned, _ in self._owned
        ]

    def committed(self, step: int) -> None:
        """`step` was committed and the optimizer has stepped."""
        if self._phase is not Phase.MOVING:
            return
        taken, self._taken = self._taken, None
        hyper, self._hyper = self._hyper, None
        for index, (owned, line) in enumerate(self._owned):
            gradients = taken[index] if taken is not None else ()
            if any(
                g is not None and (g.dtype, g.layout) != (p.dtype, torch.strided)
                for g, p in zip(gradients, owned.trained, strict=False)
            ):
                line.fail("gradients are of another type than parameters")
                continue
            line.offer(
                Sent(
                    step=step,
                    gradients=gradients,
                    buffers=tuple(b.detach().clone() for b in owned.buffers),
                    stepped=taken is not None,
                )
            )
        for incoming in self._incoming:
            incoming.note(step, hyper)

    def between(self, step: Step, *, until: int) -> None:
        """All ranks stand between `step` and the next, in a world that goes on: do what is due.

        Blocks, at the switch until this rank has loaded its stage.
        """
        due, self._due = self._due, None
        if self._proposal is None or due is None:
            return
        if step >= until:
            self.abandon("the step loop ends")
        elif self._phase is Phase.ASKED:
            self._start(step)
        elif due is Ruling.SWITCH:
            self._switch(step)

    def abandon(self, reason: str) -> None:
        """Let go of the migration under way, if there is one. Layers stay where they are."""
        proposal, phase = self._proposal, self._phase
        if proposal is None:
            return
        self._close_lines()
        self._clear()
        self._trigger.abandoned()
        if phase is not Phase.IDLE:
            self._parts.trace.event(
                "recut-dropped", bounds=list(proposal.bounds), step=self._step, reason=reason
            )

    def close(self) -> None:
        """End what is under way, threads and all."""
        self._close_lines(wait=True)
        self.abandon("the session ends")
        self._layers.on_cut = None

    # Between two steps.

    def _start(self, step: Step) -> None:
        """Tell each other what moves, and have it begin to."""
        assert self._proposal is not None, "agreed on"
        proposal, rank = self._proposal, self._parts.group.rank
        self._inject(step, 0)
        mine: dict[str, Any] = {}
        for move in proposal.moves:
            if move.source == rank:
                mine[str(move.target)] = self._offer(step, move.layers)
        try:
            told = self._exchange(mine)
        except GenerationAborted:
            return  # the next world begins without it
        env = self._parts.env
        assert env is not None, "there is more than one rank"
        for source, offers in enumerate(told):
            offer = offers.get(str(rank))
            if offer is None or "moving" not in offer:
                continue
            try:
                moving = [Moving.from_json(m) for m in offer["moving"]]
                line = Incoming(
                    Shadow(moving, self._optimizer),
                    (str(offer["address"][0]), int(offer["address"][1])),
                    bytes.fromhex(env.secret),
                    timeout_s=self._parts.stall_s,
                    reached=partial(self._inject, step),
                )
            except (ProtocolError, RuntimeError, MemoryError) as error:
                self._failed = f"layers of rank {source} have no place here: {error}"
                continue
            self._incoming.append(line)
        bare = sorted({o["bare"] for offers in told for o in offers.values() if "bare" in o})
        self._phase, self._votes = Phase.MOVING, 0
        self._began, self._began_step = time.monotonic(), step
        self._parts.trace.event(
            "recut-begins",
            generation=self._parts.group.world.generation,
            step=step,
            before=list(proposal.before),
            bounds=list(proposal.bounds),
            reason="; ".join([proposal.reason, *bare]),
        )

    def _offer(self, step: Step, layers: Sequence[int]) -> dict[str, Any]:
        """Open a line for layers of this rank's. What its target has to know."""
        env = self._parts.env
        assert env is not None, "there is more than one rank"
        try:
            modules = [self._layers.module(layer) for layer in layers]
            owned = self._snapshots.owned(modules, self._optimizer)
            told = [m.to_json() for m in owned.moving]
            path = self._snapshots.arena
            if path is None:
                raise UsageError("there is no snapshot to begin from")
            if len(json.dumps(told)) > CONTROL_BYTES_MAX // 4:
                raise UsageError(f"{len(told)} tensors are too many to tell of")
            generation = self._parts.group.world.generation
            line = Outgoing(
                env.host,
                bytes.fromhex(env.secret),
                partial(
                    copy_out, path, generation, step, owned.moving, timeout_s=self._parts.stall_s
                ),
                state_bytes=sum(m.nbytes for m in owned.moving),
                timeout_s=self._parts.stall_s,
                reached=partial(self._inject, step),
            )
        except (UsageError, OSError, KeyError) as error:
            return {"bare": f"layers {list(layers)} move at the switch: {error}"}
        self._owned.append((owned, line))
        return {"address": line.address, "moving": told}

    def _switch(self, step: Step) -> None:
        """Build the new stages, and load them, with all other ranks. Blocks."""
        assert self._proposal is not None, "agreed on"
        proposal, start = self._proposal, time.monotonic()
        self._inject(step, 3)
        # As they are now: an optimizer may have put others in their place.
        live = self._snapshots.replicated()
        mine = {m.name: hash_of(live[m.name]) for owned, _ in self._owned for m in owned.moving}
        hashes = dict[str, int]()
        for line in self._incoming:
            if line.wait(step, self._parts.stall_s / 4):
                hashes |= line.shadow.hashes()
        waited_s = time.monotonic() - start
        try:
            told = self._exchange(mine)
        except GenerationAborted:
            return
        theirs = {name: value for one in told for name, value in one.items()}
        wrong = sorted(name for name, value in hashes.items() if theirs.get(name) != value)
        near = [line.shadow for line in self._incoming]
        for shadow in near:
            shadow.keep(name for name, value in hashes.items() if theirs.get(name) == value)
        if wrong:
            logger.warning(
                "%d tensors that moved ahead are not the owner's, %s first; they are read from memory",
                len(wrong),
                wrong[0],
            )
        lines = self._lines
        began, began_step = self._began, self._began_step
        self._close_lines()
        self._clear()
        self._switching = True
        self._layers.target = proposal.bounds
        # No recovery, which has deadlines of its own: whoever stands still here is found as in a
        # step. What `build` may take is known from the last time.
        try:
            with self._parts.recorder.allowed(BUILD_TIMES * self._worlds.switch_s):
                done = self._worlds.recut(step, near)
        finally:
            self._switching, self._layers.target = False, None
        if done is None:
            return
        now = time.monotonic()
        self._parts.trace.event(
            "recut",
            generation=self._parts.group.world.generation,
            step=step,
            before=list(proposal.before),
            bounds=list(proposal.bounds),
            reason=proposal.reason,
            layers=[layer for move in proposal.moves for layer in move.layers],
            bulk_bytes=sum(line.bulk_bytes for line in lines),
            gradient_bytes=sum(line.gradient_bytes for line in lines),
            late_bytes=done.moved,
            unproved=wrong[:TOLD_MAX],
            overlapped=step - began_step,
            seconds=now - began,
            waited_s=waited_s,
            stalled_s=now - start,
        )

    def _exchange(self, mine: dict[str, Any]) -> list[dict[str, Any]]:
        """What all ranks tell, in order. Blocks."""
        data = json.dumps(mine, separators=(",", ":")).encode()
        if len(data) > CONTROL_BYTES_MAX:
            data = b"{}"  # then what would move ahead moves at the switch
        told = [json.loads(one) for one in self._parts.group.exchange(data).wait()]
        if not all(isinstance(one, dict) for one in told):
            raise ProtocolError("not what a rank tells of layers that move")
        return told

    def _cut(self, bounds: Sequence[int]) -> None:
        """(Layers) A cut is in force, in this world or another."""
        if not self._switching:
            self.abandon("the world has changed")
        self._trigger.begin(bounds, recut=self._switching)

    def _close_lines(self, *, wait: bool = False) -> None:
        for line in self._lines:
            with contextlib.suppress(OSError):
                line.close(wait=wait)

    def _inject(self, step: int, stage: int) -> None:
        self._parts.injector.at(Point.MIGRATION, step, bucket=stage)

    @property
    def _lines(self) -> list[Outgoing | Incoming]:
        return [*(line for _, line in self._owned), *self._incoming]

    @property
    def _step(self) -> int:
        return self._parts.membership.step or 0

    @property
    def _optimizer(self) -> torch.optim.Optimizer:
        return self._snapshots.optimizer
