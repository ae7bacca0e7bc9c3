"""TrafficGovernor: a rank sends something big in training's idle windows, a piece at a time.

For snapshots that go to a peer, state for a newcomer, and whatever else shares the network with
gradients. (Agents have a governor of their own, see `launch.traffic`.) The receiver acknowledges
every piece with a byte: that a piece was sent only means that a buffer has taken it.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from ftkit.collectives.overlap.flights import of
from ftkit.core.errors import UsageError
from ftkit.core.governor import Forecast, Governor, Grant, TrafficLimits
from ftkit.core.idle_windows import IdleWindows

#: Tags of pieces and of their acknowledgements.
_PIECE, _ACK = 0x7F20_0000, 0x7F20_0001


#: Small pieces, and many on their way: an acknowledgement queues behind all that goes the other way,
#: so of n pieces each way at most n / (n + 1) of the link's time is used.
LIMITS = TrafficLimits(piece_bytes_max=256 << 10, unacknowledged_max=6)


class _Flying:
    """A piece on its way, and the acknowledgement that is awaited."""

    def __init__(self, grant: Grant, let_go: float) -> None:
        self.grant, self.let_go = grant, let_go
        self.ack = torch.zeros(1, dtype=torch.uint8)
        self.came: Any = None
        self.sent: Any = None


class TrafficGovernor:
    """One rank's. `begin`, `end` and `busy` from any thread; one thread sends, one receives."""

    def __init__(
        self,
        group: Any = None,
        *,
        limits: TrafficLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
        rest: Callable[[float], None] = time.sleep,
    ) -> None:
        """Govern what this rank sends over `group`.

        Args:
          group: of the ranks that send to each other; None for the default group.
          limits: the same on all of them; pieces are of `piece_bytes_max` bytes.
          clock: seconds.
          rest: sleeps.

        Raises:
          UsageError: the group is gloo's.
        """
        self._group, self._limits = of(group), limits or LIMITS
        if self._group.name() == "gloo":
            raise UsageError(
                "gloo does not tell whether a message has come without waiting for it; pass a group "
                'of the backend "ftkit"'
            )
        self._clock, self._rest = clock, rest
        self._lock = threading.Lock()
        # ---- under the lock ----
        self._windows = IdleWindows()
        self._governor = Governor(self._limits, self._windows, clock(), look_s=0.0005)

    def begin(self) -> None:
        """A transfer of training's begins."""
        with self._lock:
            self._windows.begin(self._clock())

    def end(self) -> None:
        """It has ended."""
        with self._lock:
            self._windows.end(self._clock())

    @contextmanager
    def busy(self) -> Iterator[None]:
        """`begin` and `end`."""
        self.begin()
        try:
            yield
        finally:
            self.end()

    def attach(self, model: Any) -> None:
        """See the buckets of a DistributedDataParallel, which are reduced as before.

        Nobody waits for them. The model must have no communication hook yet.
        """
        group = model.process_group

        def hook(
            state: object,
            bucket: dist.GradBucket,  # type: ignore[name-defined]
        ) -> torch.futures.Future[torch.Tensor]:
            # Divided before the sum, as DDP does: of many ranks it could be too large for half.
            grads: torch.Tensor = bucket.buffer().div_(group.size())
            self.begin()
            try:
                work = dist.all_reduce(grads, op=dist.ReduceOp.SUM, group=group, async_op=True)
            except BaseException:
                self.end()
                raise

            def done(future: torch.futures.Future[Any]) -> torch.Tensor:
                self.end()
                future.value()  # raises what the reduction raised
                return grads

            future: torch.futures.Future[torch.Tensor] = work.get_future().then(done)
            return future

        model.register_comm_hook(None, hook)

    def forecast(self, nbytes: int, *, within_s: float | None = None) -> Forecast:
        """How long so many bytes will take, from the windows of the last steps."""
        with self._lock:
            return self._governor.forecast(nbytes, within_s=within_s)

    @property
    def windows(self) -> list[float]:
        """The idle windows of the last steps, in seconds."""
        with self._lock:
            return self._windows.lengths

    @property
    def idle_share(self) -> float:
        """The part of the time that training leaves the network alone, by the last steps."""
        with self._lock:
            return self._windows.idle_share()

    @property
    def granted(self) -> int:
        """Bytes that were let go so far."""
        with self._lock:
            return self._governor.granted

    def send(self, tensor: torch.Tensor, target: int) -> None:
        """Send a contiguous tensor, which must not change meanwhile. Blocks until it is there.

        Raises:
          GenerationAborted: a member was lost.
        """
        flying: deque[_Flying] = deque()
        try:
            self._send(tensor, target, flying)
        finally:
            with self._lock:
                for piece in flying:
                    self._governor.given_up(piece.grant)

    def _send(self, tensor: torch.Tensor, target: int, flying: "deque[_Flying]") -> None:
        last = self._clock()
        for piece in self._pieces(tensor):
            while True:
                last = self._acknowledged(flying, last)
                with self._lock:
                    decision = self._governor.decide(self._clock(), piece.numel(), whole=True)
                if isinstance(decision, Grant):
                    break
                self._rest(decision.seconds)
            flying.append(_Flying(decision, self._clock()))
            flying[-1].came = self._group.recv([flying[-1].ack], target, _ACK)
            flying[-1].sent = self._group.send([piece], target, _PIECE)
        while flying:
            flying[0].came.wait()
            last = self._acknowledged(flying, last)

    def recv(self, into: torch.Tensor, source: int) -> None:
        """Receive into a contiguous tensor, of the size that is sent. Blocks; as `send`."""
        acks = []
        pieces = list(self._pieces(into))
        # As many as the sender lets fly: what comes finds its place.
        ahead = self._limits.unacknowledged_max
        posted = [self._group.recv([p], source, _PIECE) for p in pieces[:ahead]]
        for number in range(len(pieces)):
            posted[number].wait()
            if number + ahead < len(pieces):
                posted.append(self._group.recv([pieces[number + ahead]], source, _PIECE))
            ack = torch.ones(1, dtype=torch.uint8)
            acks.append((ack, self._group.send([ack], source, _ACK)))
        for _, sent in acks:
            sent.wait()

    def _acknowledged(self, flying: "deque[_Flying]", last: float) -> float:
        """Tell the governor of pieces that are there; when the last one was."""
        there = list[_Flying]()
        while flying and flying[0].came.is_completed():
            flying[0].came.wait()
            flying[0].sent.wait()
            there.append(flying.popleft())
        if not there:
            return last
        now = self._clock()
        with self._lock:
            # A piece behind another has waited for it, and acknowledgements come behind what the
            # peer sends us, several at once: together they took this long.
            took_s = now - max(there[0].let_go, last)
            self._governor.arrived(*(piece.grant for piece in there), seconds=took_s)
        return now

    def _pieces(self, tensor: torch.Tensor) -> Iterator[torch.Tensor]:
        flat = tensor.detach().view(-1).view(torch.uint8)
        step = self._limits.piece_bytes_max
        for at in range(0, flat.numel(), step):
            yield flat[at : at + step]
