"""Runner: steps the operations of a process, each whenever all that it waits for is here.

Collectives of one channel run one at a time, in the order of issue; channels, and messages,
run beside each other. Owned by the communication thread.
"""

import logging
import math
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial

from ftkit.collectives.channel import Channel
from ftkit.collectives.faults import DoubtError, FaultError
from ftkit.collectives.frames import P2P
from ftkit.collectives.link import Ticket
from ftkit.collectives.op import Op
from ftkit.collectives.ports import OpRecorder
from ftkit.core.errors import FtkitError, GenerationAborted
from ftkit.core.ids import Generation, MemberId

logger = logging.getLogger(__name__)


class Runner:
    """See the module."""

    def __init__(
        self,
        member: MemberId,
        recorder: OpRecorder,
        stopped: Callable[[Generation], str | None],
        later: Callable[[Callable[[], None]], None],
    ) -> None:
        """Run nothing yet.

        Args:
          member: who we are.
          recorder: told of the end of every operation.
          stopped: why operations of a generation fail at once, or None.
          later: runs a command in this turn of the loop or the next.
        """
        self.active: set[Op] = set()
        """What was started and has not ended."""
        self._member = member
        self._recorder = recorder
        self._stopped = stopped
        self._later = later
        self._ready: deque[Op] = deque()

    @property
    def busy(self) -> bool:
        """Whether an operation can go on at once."""
        return bool(self._ready)

    def ready(self, op: Op) -> None:
        """All that `op` waited for is here."""
        self._ready.append(op)

    def step_ready(self, guard: Callable[[Callable[[], None]], None]) -> None:
        """Step, each under `guard`, what is ready; up to one that lets others run."""
        while self._ready:
            op = self._ready.popleft()
            guard(partial(self._step, op))
            if op.waiting < 0:
                return

    def deadline_s(self) -> float:
        """The first deadline of all that runs or is queued; infinite without one."""
        return min(
            (op.deadline_s for op in self.active if op.deadline_s is not None), default=math.inf
        )

    def waiting_since(self, before_s: float) -> list[Op]:
        """What runs, and was issued before that."""
        return [op for op in self.active if op.since_s < before_s and op.generator is not None]

    def overdue(self, now_s: float) -> Op | None:
        """An operation that is past its deadline."""
        for op in self.active:
            if op.deadline_s is not None and op.deadline_s <= now_s:
                return op
        return None

    def end(self, channels: Iterable[Channel], reason: str) -> None:
        """Fail all that has not ended: the generation is over."""
        self._ready.clear()
        for channel in channels:
            channel.queue.clear()
            channel.running = None
        for op in list(self.active):
            self._finish(op, None, GenerationAborted(reason))

    def start(self, op: Op) -> None:
        """Run `op` when its turn comes; in a generation that is over it fails at once."""
        reason = self._stopped(op.generation)
        if reason is not None:
            self._finish(op, None, GenerationAborted(reason))
            return
        self.active.add(op)
        if op.flags & P2P:
            self._step(op)
            return
        op.channel.queue.append(op)
        self._next_of(op.channel)

    def _next_of(self, channel: Channel) -> None:
        while channel.running is None and channel.queue:
            op = channel.queue.popleft()
            if op.ended:
                continue
            channel.running = op
            self._step(op)

    def _step(self, op: Op) -> None:
        while not op.ended:
            try:
                if op.generator is None:
                    op.generator = op.program(op)
                wait = next(op.generator)
            except StopIteration as end:
                self._finish(op, end.value, None)
                return
            except (FaultError, DoubtError):
                raise
            except FtkitError as error:
                raise FaultError(f"{op.name} failed at member {self._member}: {error}") from error
            except Exception as error:
                # Ours or numpy's: the peers would wait for us, so all are told.
                logger.exception("%s (operation %s) failed", op.name, op.seq)
                self._finish(op, None, error)
                raise FaultError(f"{op.name} failed at member {self._member}: {error!r}") from error
            if wait is None:
                self._ready.append(op)
                op.waiting = -1
                return
            tickets = (wait,) if isinstance(wait, Ticket) else tuple(wait)
            pending = [t for t in tickets if not t.done]
            if not pending:
                continue
            op.waiting = len(pending)
            for ticket in pending:
                ticket.owner = op
            return

    def _finish(self, op: Op, value: object, error: Exception | None) -> None:
        if op.ended:
            return
        op.ended = True
        self.active.discard(op)
        self._recorder.leave(op.recorded, op.seq, error is None)
        if error is None:
            op.handle.finish(value)
        else:
            op.handle.fail(error)
        if op.channel.running is op:
            op.channel.running = None
            if error is None:
                # Not here: a long row of short operations would nest as deep as it is long.
                self._later(lambda: self._next_of(op.channel))
