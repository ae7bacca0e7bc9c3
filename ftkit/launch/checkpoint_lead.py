"""CheckpointLead: the coordinator's part in the writing of checkpoints, until the job's end."""

from collections.abc import Mapping

from ftkit.core.ids import NodeId, Step
from ftkit.launch.checkpointing import ATTEMPTS_MAX, Order, OrderEnd, Report, judge
from ftkit.launch.disk import Tell
from ftkit.launch.ending import End, Ending

#: Until the first event that says how far the last checkpoint is; then twice as long each time.
PROGRESS_S = 2.0
PROGRESS_MAX_S = 60.0


class CheckpointLead:
    """Owns the order that is in force. Of the coordinator's thread."""

    def __init__(self, number: int, tell: Tell) -> None:
        """Begin without an order.

        Args:
          number: of the coordinator: its attempts are numbered above those before it.
          tell: told of attempts that fail, and of the last checkpoint.
        """
        self._tell = tell
        self._attempts = number * ATTEMPTS_MAX
        self.written: Step | None = None
        """The newest checkpoint that this coordinator saw committed."""
        self._ending: Ending | None = None
        self._tell_next: float | None = None
        self._tell_every = PROGRESS_S
        self.order: Order | None = None
        """What the agents are to do."""

    @property
    def over(self) -> bool:
        """Whether the job has ended, and no agent has to wait for a checkpoint any more."""
        return self._ending is not None and self._ending.over

    def advance(self, reports: Mapping[NodeId, Report], end: End | None, *, now: float) -> bool:
        """Judge once more; returns whether the agents have to be told something.

        Args:
          reports: of every persister that can be reached.
          end: of the job; None while it goes on.
          now: seconds.
        """
        before = self.order, self.over
        due = None
        if end is not None:
            self._ending = self._ending or Ending(end.stop, self.written)
            due = self._ending.due(end, now)
        order, outcome = judge(self.order, reports, last_attempt=self._attempts, due=due)
        if self._ending is not None and end is not None and order is not None:
            self._tell_progress(order, reports, now)
            if late := self._ending.too_late(order, end, now):
                order, outcome = None, late
        if outcome is not None:
            self._take(outcome)
        self.order = order
        self._attempts = order.attempt if order else self._attempts
        if self._ending is not None and self.over and not before[1]:
            self._tell("checkpoint-last", step=self._ending.step, failed=self._ending.failed)
        return before != (self.order, self.over)

    def _take(self, outcome: OrderEnd) -> None:
        if outcome.failed:
            self._tell("checkpoint-failed", step=outcome.step, reason=outcome.failed)
        else:
            self.written = outcome.step
        if self._ending is not None:
            self._ending.take(outcome)

    def _tell_progress(self, order: Order, reports: Mapping[NodeId, Report], now: float) -> None:
        if self._tell_next is None:
            self._tell_next = now + self._tell_every
        if now < self._tell_next:
            return
        self._tell_every = min(2 * self._tell_every, PROGRESS_MAX_S)
        self._tell_next = now + self._tell_every
        written = sum(r.written for r in reports.values() if r.attempt == order.attempt)
        self._tell("checkpoint-progress", step=order.step, bytes=written, of=order.bytes)
