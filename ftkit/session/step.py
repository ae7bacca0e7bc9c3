"""Step: the transaction a user writes as ``with step:``.

Inside it gradients are summed over the slots, the ranks vote just before the first optimizer
changes anything, and the step commits or is played again::

    __enter__      clean gradients, remember the buffers that forward passes change
    batches()      each of this rank's slots: seed, yield, take the gradients; then reduce
    optimizer      (pre-hook) vote; passed: wait for the last capture, let it step
    __exit__       committed: capture begins; rolled back: as if it had not been

A fault of the job inside the body is swallowed here, the user's own exceptions go through.
"""

from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch

from ftkit.core.errors import GenerationAborted, JobFault, StepRolledBack, UsageError
from ftkit.core.ids import Generation, Slot

if TYPE_CHECKING:
    from ftkit.session.session import Session

from ftkit.core.ids import Step as StepNumber


class Step:
    """One attempt at one optimizer step. Used once, by the training thread."""

    def __init__(self, session: "Session", number: StepNumber, generation: Generation) -> None:
        self._session = session
        self._number = number
        self.generation = generation
        self._losses: dict[Slot, float] = {}
        self._slot: Slot | None = None
        self._reduced = False
        self.entered = False
        self.committed = False
        """Whether the step counts. False after it was rolled back; it comes round again."""
        self.loss: float | None = None
        """Mean of the recorded losses over all slots of all ranks, once committed."""

    @property
    def index(self) -> int:
        """The number of this step, counted from 1."""
        return self._number

    def __enter__(self) -> Self:
        self.entered = True
        self._session._begin(self)
        return self

    def batches(self) -> Iterator[Any]:
        """This rank's slots of the global batch, one collated batch each.

        Run forward and `backward` on each, with the mean loss over its samples. When the
        loop ends, the gradients of all slots of all ranks are summed and divided by the
        number of slots; every rank then holds the same `.grad`, ready for clipping and the
        optimizer.

        Raises:
          UsageError: called outside `with step:`, or twice.
          JobFault: the job failed; leave it to `with step:`.
        """
        if self._session._current is not self:
            raise UsageError("call step.batches() inside `with step:`")
        if self._reduced or self._slot is not None:
            raise UsageError("step.batches() may be used once in a step")
        for slot in self._session._slots(self):
            self._slot = slot
            yield self._session._start_slot(self, slot)
            self._session._end_slot(self, slot)
        self._session._reduce(self)
        self._reduced = True

    def record(self, loss: torch.Tensor | float) -> None:
        """Note the loss of the current slot, for `step.loss`.

        Called between a batch and the next. On a GPU it waits for the loss to be there.
        """
        if self._slot is None:
            raise UsageError("step.record(loss) belongs inside `for ... in step.batches()`")
        value = loss.detach().item() if isinstance(loss, torch.Tensor) else loss
        self._losses[self._slot] = float(value)

    @property
    def losses(self) -> dict[Slot, float]:
        """What was recorded on this rank so far."""
        return dict(self._losses)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        session = self._session
        if error is None and not self.committed:
            # No optimizer stepped (a GradScaler may skip it): the step still has to count.
            try:
                session._vote(self)
            except JobFault as fault:
                error = fault
        if error is None:
            session._end(self)
            return False
        if self.committed or not session._is_job_fault(self, error):
            session._current = None
            return False
        session._roll_back(self, error)
        return True


def is_aborted(error: BaseException) -> bool:
    """Whether `error` is a job fault, or torch's account of one.

    An error that passes through a torch Future or the autograd engine may come out as a
    RuntimeError with the original's text, so the text is looked at too.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, (GenerationAborted, StepRolledBack)):
            return True
        if isinstance(seen, RuntimeError) and GenerationAborted.__name__ in str(seen):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
