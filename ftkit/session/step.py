"""Step: the transaction a user writes as ``with step:``.

Inside it gradients are summed over the slots, the ranks vote just before the first optimizer
changes anything, and the step commits or is played again::

    __enter__      clean gradients, remember the buffers that forward passes change
    batches()      each of this rank's slots: seed, yield, take the gradients; then reduce
    optimizer      (pre-hook) vote; passed: wait for the last capture, let it step
    __exit__       committed: capture begins; rolled back: as if it had not been

A fault of the job inside the body is swallowed here, the user's own exceptions go through.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

from ftkit.collectives.gradients import GradientReducer, Waitable
from ftkit.collectives.handle import finished
from ftkit.collectives.running_sum import by_rank
from ftkit.collectives.sharded_unit import Pending
from ftkit.collectives.slot_tree import SlotNode
from ftkit.core.errors import (
    GenerationAborted,
    JobFault,
    StepRolledBack,
    UsageError,
)
from ftkit.core.fault_plan import Kind, Point
from ftkit.core.ids import Generation, Slot
from ftkit.core.ids import Step as StepNumber
from ftkit.core.world import World
from ftkit.detection.row import Phase
from ftkit.recovery.data_cursor import rng_key
from ftkit.recovery.protocol import SHARDS_BACK
from ftkit.recovery.vote import Tally
from ftkit.session.buffers import StepBuffers
from ftkit.session.clip import clip
from ftkit.session.layers import seed_all
from ftkit.session.loop import Loop, Play
from ftkit.session.shares import Carried
from ftkit.session.voting import Attempt, vote
from ftkit.session.worlds import broadcast_from


class Step:
    """One attempt at one optimizer step. Used once, by the training thread."""

    def __init__(self, loop: Loop, number: StepNumber) -> None:
        """The next attempt of `loop`, in the world as it stands."""
        self._loop = loop
        self._parts = loop.parts
        self._number = number
        self._generation: Generation = self._parts.group.world.generation
        self._plays: list[Play] = []
        """Micro-batches to play, one after another."""
        self._division: tuple[tuple[Slot, ...], ...] = ()
        """The slots of every rank's sum, where each holds the whole model."""
        if loop.sharded:
            self._plays = loop.plays_of(loop.parts.group.size, self._rank)
        self._held = [slot for play in self._plays for slot in play.slots]
        """Slots of this rank's sum."""
        self._buffers: StepBuffers | None = None
        self._slot: Slot | None = None
        """The place in the sum of what is being played."""
        self._playing: tuple[Slot, ...] = ()
        """Its slots."""
        self._losses: dict[Slot, float] = {}
        self._bucket = 0
        self._digest: int | None = None
        """Of the reduced gradients, once they are."""
        self._state_digest = 0
        """Of the state that they are applied to, where replicas of it are compared in this step."""
        self._result: Tally | None = None
        """Of the vote; None before it, and where it was cut in half."""
        self._done: set[Slot] = set()
        """Of this rank's sum, the slots played to their end."""
        self._carried: Carried | None = None
        """Of an attempt before, whose sums this one goes on with."""
        self._meetings = self._parts.group.meetings
        """Overlapped operations of this rank before this attempt."""
        self._newcomers: World | None = None
        """The world to switch to before the next step."""
        self.entered = False
        self.over = False
        """Whether it was committed or rolled back, rather than left by an exception."""
        self.committed = False
        """Whether the step counts. False after it was rolled back; it comes round again."""
        self.loss: float | None = None
        """Mean of the recorded losses over all slots of all ranks, once committed; their sum in a
        loop that sums. None when nothing was recorded, or the step was rolled forward after a fault: its ballots, which
        carry the losses, are lost."""
        self.skipped = False
        """Whether it counts and its gradients were dropped, being not finite (`on_nan="skip"`)."""

    @property
    def index(self) -> int:
        """The number of this step, counted from 1."""
        return self._number

    def __enter__(self) -> Self:
        if self._loop.current is not None:
            raise UsageError("a step is open already: do not nest `with step:`")
        if self.entered:
            raise UsageError(
                "this attempt is used up: ask the `for` loop for the next one, it brings a step "
                "that was rolled back round again"
            )
        self._loop.check_parameters()
        self._loop.schedulers.begin(self._number, self._generation)
        self.entered = True
        self._loop.current = self
        self._parts.recorder.step(self._number)
        self._begin_sums()
        self._loop.numbers.begin(self._number, self._generation)
        if self._loop.corrupter.armed:
            self._loop.corrupter.state(self._number, self._loop.snapshots.steady())
        self._buffers = StepBuffers(self._loop.modules)
        return self

    def batches(self) -> Iterator[Any]:
        """This rank's slots of the global batch, one collated batch each.

        Run forward and `backward` on each, with the mean loss over its samples. When the
        loop ends, the gradients of all slots of all ranks are summed and divided by the
        number of slots; every rank then holds the same `.grad`, ready for clipping and the
        optimizer. Where a GradScaler is protected the ranks vote at once: `agree`. Of a sharded model all ranks play equally many: one that has no slot left is
        given its first batch once more, and what comes of it does not count.

        Raises:
          UsageError: called outside `with step:`, or twice.
          JobFault: the job failed; leave it to `with step:`.
        """
        if self._loop.current is not self or self._slot is not None or self._digest is not None:
            raise UsageError("use step.batches() inside `with step:`, once in a step")
        if self._loop.layers is not None:
            raise UsageError("every stage of a pipeline plays all slots: use step.slots()")
        if not self._loop.sharded:
            self._divide()
        for play in self._plays:
            yield self._begin_slot(play)
            self._end_slot(play)
        self._reduce()
        if self._loop.loss_scaling:
            # Unscaling changes the gradients, and the scaler remembers that it has: not twice.
            self.agree()

    def slots(self) -> list[Any]:
        """The batches of all slots of the global batch, for a pipeline's schedule to run through.

        Each stage runs forward and backward of each, in order. The optimizer's step, or clipping,
        then divides the gradients by the number of slots.

        Raises:
          UsageError: called outside `with step:`, twice, or without `protect(..., stages=True)`.
          JobFault: the job failed; leave it to `with step:`.
        """
        if self._loop.layers is None:
            raise UsageError("step.slots() is for protect(build=..., stages=True)")
        if self._loop.current is not self or self._slot is not None or self._digest is not None:
            raise UsageError("use step.slots() inside `with step:`, once in a step")
        batches = []
        for number in range(self._loop.slots):
            self._check()
            slot = self._slot = Slot(number)
            self._playing = (slot,)
            self._parts.recorder.phase(Phase.DATA)
            self._parts.injector.at(Point.DATA, self._number)
            seed_all(rng_key(self._loop.seed, self._number, slot))
            batch = self._loop.feed.batch(self._number, slot)
            self._loop.note_batch(self._number, slot, batch)
            batches.append(batch)
        self._parts.recorder.phase(Phase.FORWARD)
        return batches

    def layer(self, index: int, module: torch.nn.Module, *inputs: Any, slot: int) -> Any:
        """Run one layer of a pipeline forward over a slot: `module(*inputs)`.

        What it draws at random depends on (seed, step, slot, index) alone, whichever rank holds it,
        and how long it takes, backward too, decides the next cut (`session.cut`).

        Raises:
          UsageError: called before `slots`, or without `protect(..., stages=True)`.
          JobFault: the job failed; leave it to `with step:`.
        """
        if self._loop.layers is None or self._slot is None:
            raise UsageError("step.layer() runs the layers of a pipeline, after step.slots()")
        self._check()
        if slot:
            # All stages are at work by then.
            self._parts.injector.at(Point.FORWARD, self._number)
        key = rng_key(self._loop.seed, self._number, Slot(slot))
        return self._loop.layers.run(index, module, inputs, key=key)

    def clip_grad_norm_(self, max_norm: float) -> float:
        """Scale the gradients so that their norm over all parameters is at most `max_norm`.

        As `torch.nn.utils.clip_grad_norm_`, with the same bits however the model is cut. Called by
        all ranks alike, after the loop over the batches.

        Returns:
          The norm before.

        Raises:
          UsageError: called before the gradients are there.
          JobFault: the job failed; leave it to `with step:`.
        """
        self._finish_stage()
        if self._digest is None:
            raise UsageError("clip after the loop over step.batches(), inside `with step:`")
        self._check()
        stages = self._loop.layers is not None
        return clip(self._loop.modules, max_norm, self._parts.group, stages=stages)

    def record(self, loss: torch.Tensor | float, *, slot: int | None = None) -> None:
        """Note the loss of the current slot, for `step.loss`; in a pipeline, of the `slot` named.

        Called between a batch and the next. On a GPU it waits for the loss to be there.
        """
        if self._slot is None:
            raise UsageError("step.record(loss) belongs inside `for ... in step.batches()`")
        value = loss.detach().item() if isinstance(loss, torch.Tensor) else loss
        told = self._playing if slot is None else (Slot(slot),)
        if told:
            value = self._loop.corrupter.loss(float(value))
            # A mean over samples is that of each, a sum is shared among them.
            share = value if self._loop.mean else value / len(told)
            self._losses.update(dict.fromkeys(told, share))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        try:
            if error is None and not self.committed:
                # No optimizer stepped (a GradScaler may skip it): the step still has to count.
                try:
                    self._vote()
                except JobFault as fault:
                    error = fault
            if error is None:
                self._commit()
                self.over = True
                return False
            if self.committed or not self._is_job_fault(error):
                return False
            self._roll_back(error)
            self.over = True
            return True
        finally:
            self._loop.current = None
            if self._loop.scaled is not None:
                self._loop.scaled.stop()
            self._loop.reducer.end()
            if not self.committed:
                # Who votes or reduces is taken to wait for others. What comes next is the user's code,
                self._parts.recorder.phase(Phase.BETWEEN)
                if self._buffers is not None:
                    # and begins where this step began, whatever ended it.
                    self._buffers.rewind()

    def agree(self) -> None:
        """Vote now, rather than with the first optimizer's step: on return the step counts.

        For loops that are not written around `with step:` (a framework's): what comes before
        may be played again, what comes after is not.

        Raises:
          JobFault: it does not count; leave it to `with step:`.
        """
        if not self.committed:
            self._vote()

    def before_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """(optimizer pre-hook) Vote before the first optimizer of the step changes anything."""
        self.agree()
        if self._loop.recutter is not None:
            self._loop.recutter.before_optimizer(optimizer)
        self._parts.recorder.phase(Phase.CAPTURE)
        self._loop.snapshots.gate()
        self._parts.recorder.phase(Phase.OPTIMIZER)
        self._parts.injector.at(Point.COMMIT, self._number)
        self._parts.injector.at(Point.OPTIMIZER, self._number)

    def undo(self) -> None:
        """The step was committed, and then lost: what was loaded instead stays as it is."""
        self.committed, self._buffers = False, None

    def reduce_bucket(self, nodes: Sequence[SlotNode], out: torch.Tensor, scale: float) -> Waitable:
        """(reducer) Start the canonical reduction of one bucket."""
        inject, last = self._parts.injector.at, self._bucket + 1 == self._loop.reducer.buckets
        inject(Point.BACKWARD, self._number, bucket=self._bucket, last=last)
        self._check()
        nbytes = out.numel() * out.element_size()
        inject(Point.IN_COLLECTIVE, self._number, bucket=self._bucket, last=last, nbytes=nbytes)
        if slip := self._parts.injector.slip(self._number, bucket=self._bucket, last=last):
            self._bucket += 1
            return self._slip(slip, nodes, out, scale)
        slots, division = self._loop.slots, self._division
        if self._loop.scaled is not None:
            nodes, division = by_rank(nodes, division, self._rank)
            slots = sum(map(len, division))
        handle = self._parts.group.reduce_slots(
            nodes, out, slots=slots, scale=scale, division=division
        )
        inject(Point.ALL_REDUCE, self._number, bucket=self._bucket, last=last)
        self._bucket += 1
        return handle

    def _slip(
        self, kind: Kind, nodes: Sequence[SlotNode], out: torch.Tensor, scale: float
    ) -> Waitable:
        """(drills) Do something else than the others where they reduce a bucket."""
        group, half = self._parts.group, max(1, out.numel() // 2)
        if kind is Kind.DESYNC_SKIP:
            return finished(None)
        if kind is Kind.DESYNC_OP:
            return group.all_reduce(out.clone())
        fewer = [replace(node, value=node.value[:half]) for node in nodes]
        return group.reduce_slots(
            fewer, out[:half], slots=self._loop.slots, scale=scale, division=self._division
        )

    def exchange_rows(self, out: torch.Tensor, rows: torch.Tensor, *, last: bool) -> Pending:
        """(sharded reducer) Begin to give each rank the gradients of what it owns."""
        inject = self._parts.injector.at
        inject(Point.BACKWARD, self._number, bucket=self._bucket, last=last)
        self._check()
        nbytes = out.numel() * out.element_size()
        inject(Point.IN_COLLECTIVE, self._number, bucket=self._bucket, last=last, nbytes=nbytes)
        work: Pending | None = dist.all_to_all_single(out, rows, async_op=True)
        assert work is not None, "every rank is in the world"
        inject(Point.ALL_REDUCE, self._number, bucket=self._bucket, last=last)
        self._bucket += 1
        return work

    @property
    def _rank(self) -> int:
        return self._parts.group.rank

    def _summed(self, done: Collection[Slot]) -> tuple[list[int], list[int]]:
        """Slots whose gradients this rank has summed, and those it has to go through again.

        Those are in the sums in part, or were not played to their end: an attempt may break in the
        last moment of a backward pass, as the sums are handed over.
        """
        reducer = self._loop.reducer
        if not isinstance(reducer, GradientReducer):
            return [], []
        whole, part = reducer.summed
        kept = [slot for slot in whole if slot in done]
        return kept, sorted({*whole, *part} - {*kept})

    def _begin_sums(self) -> None:
        """A new attempt begins with no gradients, or with those of one whose world broke."""
        reducer, shares = self._loop.reducer, self._loop.shares
        carried, shares.carried = shares.carried, None
        if carried is None or not isinstance(reducer, GradientReducer):
            reducer.begin()
            return
        same = (carried.step, carried.restores) == (self._number, self._loop.snapshots.restores)
        reducer.begin(keep=same)
        self._carried = carried if same else None

    def _divide(self) -> None:
        """Find out which slots to play, and which need not be. Blocks in the first step of a world."""
        reducer, carried = self._loop.reducer, self._carried
        assert isinstance(reducer, GradientReducer), "every rank holds the whole model"
        assert self._buffers is not None, "batches() runs inside the step"
        self._check()
        summed = self._summed(carried.done) if carried else ([], [])
        share = self._loop.shares.divide(self._number, self._generation, summed)
        if carried is not None and not share.kept:
            # Also what was summed in part: it is played from its beginning.
            reducer.begin()
        elif carried is not None:
            self._done.update(share.kept)
            self._losses.update({s: v for s, v in carried.losses.items() if s in share.kept})
            if 0 in share.kept:
                self._buffers.resume(carried.after_first)
        self._division, self._plays = share.division, self._loop.grouped(share.todo)
        self._held = sorted((*share.kept, *share.todo))

    def _begin_slot(self, play: Play) -> Any:
        self._check()
        assert self._buffers is not None, "batches() runs inside the step"
        loop = self._loop
        self._parts.recorder.phase(Phase.DATA)
        self._parts.injector.at(Point.DATA, self._number)
        self._parts.drag.loading(self._number)
        self._slot, self._playing = play.at, play.slots
        # Without a slot it plays along with what it has read already.
        drawn = play.slots or (self._held[0],)
        self._buffers.rewind()
        loop.shares.began()
        weight = 1
        if loop.scaled is not None:
            batch = loop.scaled.begin(self._number, drawn, loop.note_batch)
            weight = loop.scaled.weight(play.slots)
        else:
            seed_all(rng_key(loop.seed, self._number, drawn[0]))
            batch = loop.feed.batch(self._number, drawn[0])
            loop.note_batch(self._number, drawn[0], batch)
        loop.reducer.start_slot(play.at, last=play is self._plays[-1], weight=weight)
        loop.corrupter.slot(self._number, drawn[0])
        self._parts.recorder.phase(Phase.FORWARD)
        self._parts.injector.at(Point.FORWARD, self._number)
        self._parts.drag.began(self._number)
        return batch

    def _end_slot(self, play: Play) -> None:
        self._check()
        assert self._buffers is not None, "batches() runs inside the step"
        self._parts.drag.ended(self._number)
        self._loop.shares.ended(len(play.slots))
        if self._loop.scaled is not None:
            self._loop.scaled.end()
        self._loop.reducer.end_slot()
        if 0 in play.slots:
            self._buffers.keep()
            if self._loop.scaled is not None and self._buffers.changed:
                raise UsageError(
                    "a buffer of the model changes in the forward pass, and what it becomes depends "
                    'on which samples are played together: use consistency="bitwise"'
                )
        self._done.update(play.slots)

    def _reduce(self) -> None:
        self._check()
        assert self._buffers is not None, "batches() runs inside the step"
        self._parts.recorder.phase(Phase.REDUCE)
        # Without buffers, it stays as it is until the optimizer steps; the last bucket is on its way.
        self._state_digest = self._loop.replicas.digest(self._number)
        digest = self._loop.reducer.finish(held=len(self._held))
        root = next((r for r, held in enumerate(self._division) if 0 in held), 0)
        self._buffers.share(lambda buffer: broadcast_from(self._parts.group, buffer, root))
        self._digest = digest
        self._slot = None
        self._loop.numbers.weigh(len(self._held))
        self._parts.recorder.phase(Phase.FORWARD)

    def _finish_stage(self) -> None:
        """All slots have been played through this stage, if it is one: sum up."""
        if self._loop.layers is None or self._slot is None or self._digest is not None:
            return
        self._check()
        self._parts.recorder.phase(Phase.REDUCE)
        self._parts.injector.at(Point.BACKWARD, self._number, last=True)
        self._digest = self._loop.reducer.finish(held=self._loop.slots)
        self._slot = None
        self._loop.layers.look(self._loop.reducer)
        self._loop.numbers.weigh(1)
        self._parts.recorder.phase(Phase.FORWARD)

    def _vote(self) -> None:
        """Agree that this step counts. Returns when it does; blocks through a repair.

        Raises:
          StepRolledBack: it does not.
        """
        self._finish_stage()
        if self._digest is None:
            raise UsageError(
                "the step has no gradients: loop over step.batches() to its end before the "
                "optimizer steps"
            )
        self._check()
        self._result, self._newcomers = vote(
            self._loop,
            Attempt(
                number=self._number,
                generation=self._generation,
                digest=self._digest,
                state_digest=self._state_digest,
                held=self._held,
                losses=self._losses,
            ),
        )
        if self._result is not None:
            self.loss = self._result.loss if self._loop.mean else self._result.total
        self.committed = True
        self.skipped = self._loop.numbers.drop()

    def _commit(self) -> None:
        """The step counts and the optimizers have stepped."""
        parts = self._parts
        parts.trace.event("commit", step=self._number, generation=self._generation, loss=self.loss)
        self._loop.numbers.committed(self._result, self._number)
        self._loop.replicas.committed()
        self._loop.shard_watch.committed(self._number)
        # A job in which state is cut over the ranks may go back by so many steps.
        kept = SHARDS_BACK if self._loop.sharded or self._loop.divided else 0
        self._loop.feed.committed(StepNumber(self._number - kept))
        self._loop.read.clear()
        if parts.membership.active:  # else it is captured on entering the next world
            self._loop.snapshots.begin(self._number, parts.group.world)
        self._loop.schedulers.committed(self._generation)
        if self._loop.recutter is not None:
            self._loop.recutter.committed(self._number)
        parts.injector.at(Point.CAPTURE, self._number)
        parts.paths.poll(self._number)
        losses = self._losses.values()
        parts.recorder.finish(
            slots=len(self._held),
            loss=sum(losses) / len(losses) if losses else None,
            grad_norm=self._loop.numbers.norm,
        )

    def let_in(self) -> None:
        """Let in whom the vote let in, or move layers, right before the next step is played.

        Not before: what ranks do together between two steps, a newcomer does not do. It begins
        with the next step. When the world ended meanwhile, the next one takes them in.
        """
        membership = self._parts.membership
        ongoing = membership.active and membership.generation == self._generation
        if self.committed and self._newcomers is not None and ongoing:
            self._parts.recorder.phase(Phase.RECOVERY)
            self._loop.worlds.switch(self._newcomers, self._number)
        elif self.committed and ongoing and self._loop.recutter is not None:
            self._loop.recutter.between(self._number, until=self._loop.until)

    def _roll_back(self, error: BaseException) -> None:
        """Note that the attempt is undone: gradients and buffers are all it changed.

        When its world broke, what was summed may be of use in the next one.
        """
        group, summed = self._parts.group, list[int]()
        active = self._parts.membership.active
        broken = group.world.generation != self._generation or not active or group.aborted
        # Samples that were summed together cannot be told apart again. And where ranks meet in a
        # slot, one that kept its own would not come to the operation for which the others wait.
        alone = group.meetings == self._meetings
        whole = self._division and self._loop.scaled is None and alone
        if broken and whole and not self._loop.numbers.again and self._buffers:
            self._loop.shares.carried = Carried(
                step=self._number,
                restores=self._loop.snapshots.restores,
                done=frozenset(self._done),
                losses=dict(self._losses),
                after_first=self._buffers.after_first,
            )
            summed = self._summed(self._done)[0]
        elif broken and self._carried is not None:
            # This one broke before it came to play: what it brought is still there.
            self._loop.shares.carried = self._carried
        self._parts.trace.event(
            "rollback",
            step=self._number,
            generation=self._generation,
            reason=str(error)[:300],
            summed=summed,
        )

    def _check(self) -> None:
        """Raise when the attempt's generation is over, before anything enters the next."""
        world = self._parts.group.world
        if world.generation != self._generation or not self._parts.membership.active:
            raise StepRolledBack(f"generation {self._generation} is over")

    def _is_job_fault(self, error: BaseException) -> bool:
        if isinstance(error, JobFault):
            return True
        group = self._parts.group
        over = group.aborted or group.world.generation != self._generation
        return over and _tells_of_abort(error)


def _tells_of_abort(error: BaseException) -> bool:
    """Whether `error` is torch's account of an aborted collective.

    One that passes through a torch Future or the autograd engine may come out as a
    RuntimeError with the original's text.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, JobFault):
            return True
        if isinstance(seen, RuntimeError) and GenerationAborted.__name__ in str(seen):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
