"""Updates: the step loop turned inside out, for a loop that a framework owns.

A framework calls, ftkit answers. One update of the framework is one step of the session::

    play    forward and backward over this rank's share of the batches, as often as it takes,
            until the ranks agree that the step counts
    ...     clipping, optimizer, scheduler, callbacks, logging, saving: the framework's own
    close   the step ends, and its snapshot holds all the framework did with it

What stands between `play` and `close` happens once, for a step that counts. `close` comes with
the next update rather than after the optimizer, so that a rank which is restored from the
snapshot goes on where the framework's next update begins.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import xxhash

from ftkit.core.errors import FtkitError, UsageError
from ftkit.core.ids import Slot
from ftkit.core.ids import Step as StepNumber
from ftkit.recovery.data_cursor import derive
from ftkit.session import Session
from ftkit.session.feed import digest_of
from ftkit.session.layers import seed_all
from ftkit.session.step import Step

#: Plays one batch: forward and backward. Returns the loss, if there was one.
PlayBatch = Callable[[Any], torch.Tensor | None]


class Given:
    """(Feed) The batches of the update under way, which the framework has read.

    An update may have fewer than there are slots, at the end of an epoch: the rest are None.
    """

    def __init__(self) -> None:
        self._batches: Sequence[Any] = ()
        self._digest = 0

    def hold(self, batches: Sequence[Any]) -> None:
        """These are the batches of the next step, until it counts."""
        self._batches = batches
        hasher = xxhash.xxh3_64()
        for batch in batches:
            hasher.update(digest_of(batch).to_bytes(8, "little"))
        self._digest = hasher.intdigest() or 1

    def batch(self, step: StepNumber, slot: Slot) -> Any:
        return self._batches[slot] if slot < len(self._batches) else None

    def digest(self, step: StepNumber) -> int:
        return self._digest

    def samples(self, step: StepNumber, slot: Slot) -> list[int]:
        return [slot]  # which samples a batch holds, the framework alone knows

    def committed(self, step: StepNumber) -> None:
        self._batches = ()


class Updates:
    """One training of a framework, update by update. Used by the training thread."""

    def __init__(
        self, session: Session, *, slots: int, until: int, seed: int, mean: bool = True
    ) -> None:
        """Begin the session's step loop; its state is protected already.

        Args:
          session: of this rank.
          slots: batches of a whole update.
          until: updates in all, at most.
          seed: decides every slot's random numbers.
          mean: whether gradients and losses are divided by `slots`.
        """
        self._session = session
        self._seed = seed
        self._given = Given()
        self._steps = session.steps(self._given, slots=slots, until=until, seed=seed, mean=mean)
        self._next: Step | None = None
        self._open: Step | None = None
        self._index = 0

    def begin(self) -> None:
        """Enter the job's world, with its state. Blocks."""
        self._next = next(self._steps, None)
        self._index = self._session.step

    def play(
        self, batches: Sequence[Any], play: PlayBatch, *, undo: Callable[[], None] | None = None
    ) -> float | None:
        """Play one update until it counts. Blocks.

        Args:
          batches: of the whole update, slot by slot, the same on all ranks.
          play: is called for each batch of this rank's slots, more than once when ranks are lost.
          undo: is called after an attempt that does not count.

        Returns:
          The mean of the losses over all batches, or the sum; None for a step whose losses were
          lost with a rank (`Step.loss`).

        Raises:
          FtkitError: the job went on without this rank; let it end the process.
        """
        assert self._open is None, "an update is closed before the next is played"
        self._given.hold(batches)
        while True:
            step = self._next or next(self._steps, None)
            self._next = None
            if step is None:
                raise UsageError(f"the job ended at step {self._session.step}, this loop goes on")
            if step.index != self._index + 1:
                raise FtkitError(
                    f"the job went on from step {self._index} to {step.index - 1} without this "
                    "rank, whose loop cannot follow: it ends, and is started anew"
                )
            if self._played(step, play):
                break
            if undo is not None:
                undo()
        self._open = step
        self._index = step.index
        # What the framework draws until the next update, all ranks draw alike.
        seed_all(derive(self._seed, "between", step.index))
        return step.loss

    def close(self) -> None:
        """End the update that was played, if there is one: what was done with it is kept."""
        step, self._open = self._open, None
        if step is not None:
            step.__exit__(None, None, None)

    def end(self) -> None:
        """The framework's loop is over, on all ranks at the same update."""
        self.close()
        if self._next is not None:
            return  # restored at the very end: nothing was played here
        self._session.end_steps()
        for _ in self._steps:
            raise AssertionError("no step is played after the end")

    def _played(self, step: Step, play: PlayBatch) -> bool:
        """Play one attempt; False when it was rolled back."""
        step.__enter__()
        try:
            for batch in step.batches():
                loss = None if batch is None else play(batch)
                if loss is not None:
                    step.record(loss)
            step.agree()
        except BaseException as error:
            if not step.__exit__(type(error), error, error.__traceback__):
                raise
            return False
        return True
