"""Rounds: the outer steps of a group whose members come and go, in which all stay alike.

A round reduces one *drift* of each member and ends in a vote, which passes only where all
have the sum; then it is applied. Rounds are numbered; a member's state is how many it has
applied, and the drifts it has for the next ones.

Within a generation all members do the same operations in the same order, so there is
nothing to agree on. A new generation begins with a *meeting* (`meeting`), where all say what
they have, and after which all are alike again.

`delay` is how many rounds may be under way when a call returns: 0 in DiLoCo, 1 in the
asynchronous form, where the reduction runs beside the next inner steps.

Membership is decided elsewhere. The group is edited either by the thread that trains,
between two calls here, or inside `repair`.
"""

import logging
import zlib
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ftkit.collectives import moves
from ftkit.collectives.arithmetic import as_bytes
from ftkit.collectives.block_codec import codec_named
from ftkit.collectives.group import Group
from ftkit.collectives.handle import Handle
from ftkit.collectives.meeting import Note, settle
from ftkit.collectives.outer import Outer
from ftkit.collectives.quantized import ErrorFeedback, reduce_quantized
from ftkit.core.errors import GenerationAborted, UsageError
from ftkit.core.ids import Generation

logger = logging.getLogger(__name__)

#: Called when the generation is over: returns after the group was edited to a later world, or
#: raises to give up.
Repair = Callable[[], None]


@dataclass(slots=True)
class _Running:
    """A round that was launched in `generation`."""

    generation: Generation
    total: torch.Tensor
    summed: Handle[None]
    vote: Handle[list[bytes]]


class Rounds:
    """See the module. One thread; the group is shared with nobody who issues collectives."""

    def __init__(
        self,
        outer: Outer,
        group: Group,
        repair: Repair,
        *,
        delay: int,
        codec: str | None,
        feedback: bool,
    ) -> None:
        """Begin with no state: `join` comes first.

        Args:
          outer: owned here from now on.
          group: the world's channel is used, by us alone.
          repair: see `Repair`; called on the thread that calls us.
          delay: rounds left under way by `advance`.
          codec: of the reduction; None reduces in the dtype of the outer state.
          feedback: whether rounding errors are carried over; needs a codec.

        Raises:
          ValueError: an unknown codec, or feedback without one.
        """
        self._codec = None if codec is None else codec_named(codec)
        if feedback and codec is None:
            raise ValueError("error feedback needs a codec: without one nothing is rounded away")
        self._outer, self._group, self._repair = outer, group, repair
        self._delay = delay
        self._feedback = ErrorFeedback() if feedback else None
        self._drifts: deque[torch.Tensor | None] = deque()
        self._running: _Running | None = None
        self._met: Generation | None = None
        self._seen = self._counted = self._applied_in = 0
        alike = (outer.params.numel(), str(outer.params.dtype), outer.lr, outer.momentum_factor)
        self._settings = zlib.crc32(repr((*alike, codec, feedback, delay)).encode())
        self.applied = -1
        """Outer steps that this member's outer state holds; -1 before `join`."""

    def join(self) -> None:
        """Take part from the next meeting on; see `advance`."""
        self._advance()

    def advance(self, drift: torch.Tensor) -> None:
        """Give the drift of one inner phase; finish all rounds but `delay`. Blocks.

        Raises:
          JobStopped: everybody who held the outer state is gone.
          UsageError: members differ in parameters or settings, or `join` was forgotten.
          whatever `repair` raises.
        """
        if self.applied < 0:
            raise UsageError("call join() on every member before the first inner step")
        self._drifts.append(drift)
        self._advance()

    def drain(self) -> None:
        """Finish the rounds under way: the last call, on every member. Blocks."""
        self._advance(leave=0)

    @property
    def under_way(self) -> torch.Tensor | None:
        """Our own drift in the round under way; None without one. Not to be changed."""
        return self._drifts[-1] if self._drifts else None

    # -- the loop -------------------------------------------------------------------------

    def _advance(self, leave: int | None = None) -> None:
        leave = self._delay if leave is None else leave
        while True:
            try:
                # A member that was edited into a new world meets the others first: what it
                # had under way belongs to the old one.
                self._meet()
                while len(self._drifts) > leave:
                    self._launch()
                    self._complete()
                if self._drifts:
                    self._launch()
                return
            except GenerationAborted as fault:
                logger.info("round %s is interrupted: %s", self.applied, fault)
                if self._group.aborted:
                    ended = self._group.world.generation
                    self._repair()
                    if self._group.world.generation == ended:
                        raise UsageError(
                            "repair() returned and left the group in the generation that has "
                            "ended; it must edit the group to a later world, or raise"
                        ) from fault

    def _launch(self) -> None:
        """Start the reduction of our first drift, and the vote behind it. Does not block."""
        generation = self._group.world.generation
        if self._running is not None and self._running.generation == generation:
            return
        drift = self._drifts[0]
        source = torch.zeros_like(self._outer.params) if drift is None else drift
        if self._codec is None:
            total = source.clone()
            summed = self._group.all_reduce(total)
        else:
            total = torch.empty_like(source)
            program = reduce_quantized(
                source, total, self._codec, mean=False, feedback=self._feedback
            )
            nbytes = source.numel() * source.itemsize
            summed = self._group.channel.issue("outer_step", program, nbytes=nbytes)
        # Runs after the sum on the same channel: a ballot says that its sender has the sum.
        vote = self._group.exchange(b"\x00" if drift is None else b"\x01")
        self._running = _Running(generation, total, summed, vote)

    def _complete(self) -> None:
        assert self._running is not None, "a round is launched before it is completed"
        ballots = self._running.vote.wait()
        self._apply(sum(ballot == b"\x01" for ballot in ballots))

    def _apply(self, counted: int) -> None:
        assert self._running is not None, "a round has run before it is applied"
        total, self._applied_in = self._running.total, int(self._running.generation)
        self._running = None
        self._drifts.popleft()
        if self._feedback is not None:
            self._feedback.commit()
        if counted:
            self._outer.step(total.div_(counted))
        self.applied += 1
        self._counted, self._seen = counted, self.applied

    # -- the meeting ----------------------------------------------------------------------

    def _meet(self) -> None:
        """Once a generation: end alike in rounds, and know how many drifts there are."""
        generation = self._group.world.generation
        if self._met == generation:
            return
        if self._running is not None and _passed(self._running.vote):
            self._complete()
        notes = [Note.read(data) for data in self._group.exchange(self._note().pack()).wait()]
        settled = settle(notes)
        best, me = settled.best, self._group.rank
        self._seen = best.applied
        if me in settled.forward:
            self._apply(best.counted)
        self._hand_over(settled.sources)
        self.applied, self._applied_in, self._counted = best.applied, best.applied_in, best.counted
        self._drifts.extend([None] * (settled.end - self.applied - len(self._drifts)))
        self._running = None
        self._met = generation

    def _note(self) -> Note:
        held = self._running
        return Note(
            applied=self.applied,
            applied_in=self._applied_in,
            held_in=held.generation if held is not None and _passed(held.summed) else -1,
            end=max(self.applied, 0) + len(self._drifts),
            seen=self._seen,
            counted=self._counted,
            settings=self._settings,
        )

    def _hand_over(self, sources: Mapping[int, int]) -> None:
        """The outer state goes to the ranks in `sources`, each from the one given there."""
        channel, me = self._group.channel, self._group.rank
        given = [self._outer.params, self._outer.momentum]
        taken = [torch.empty_like(t) for t in given] if me in sources else []
        handles = []
        for rank, source in sources.items():
            for part, tensor in enumerate(taken if rank == me else given):
                data = as_bytes(tensor)
                if rank == me:
                    program = moves.recv(data, source)
                    handles.append(
                        channel.issue_p2p("recv", source, part, program, nbytes=data.size)
                    )
                elif source == me:
                    program = moves.send(data, rank)
                    handles.append(channel.issue_p2p("send", rank, part, program, nbytes=data.size))
        for handle in handles:
            handle.wait()
        if taken:
            # Only now that it is whole: what dies on the way leaves us as we were.
            self._outer.params, self._outer.momentum = taken
            self._drifts.clear()


def _passed(handle: Handle[Any]) -> bool:
    return handle.done() and handle.error is None
