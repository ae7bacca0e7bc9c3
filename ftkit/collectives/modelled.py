"""Modelled: process groups of one process, with a modelled network and a modelled time.

For tests of what hides behind what. Each rank is a thread that has entered the network; time
stands still while any of them runs, and jumps to the next arrival once all wait. So computing
takes no time unless it says so (`Network.sleep`), and every duration is exact, however busy the
machine is.

Messages are copied when they are sent and *arrive* when a network of this rate and latency would
have delivered them: a message takes the resources on its way (`Duplex`) for its bytes, first
come, first served. Collectives take the bytes of the best algorithm: an all-reduce 2(n-1)/n of
the tensor, a reduce-scatter or an all-gather (n-1)/n of the whole.
"""

# torch overloads each method for callers that do not exist in 2.13 but for C++ ones.
# mypy: disable-error-code="override"

import heapq
import itertools
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from enum import StrEnum
from typing import Any

import torch
import torch.distributed as dist

from ftkit.core.errors import GenerationAborted


class Duplex(StrEnum):
    """What two messages must share to be in each other's way."""

    WIRES = "wires"
    """Sender and receiver: each pair of ranks has a wire of its own in each direction."""
    FULL = "full"
    """Sender, or receiver: one port a rank, which sends and receives at once."""
    HALF = "half"
    """Any end: one port a rank, which sends or receives."""


class ModelledWork(dist.Work):  # type: ignore[misc,unused-ignore]
    """Something that ends at a time of the network's. `wait` lets that time pass."""

    def __init__(self, network: "Network", result: object = None) -> None:
        super().__init__()
        self._network, self._result = network, result
        # ---- under the network's condition ----
        self.ended = False
        self.error: Exception | None = None
        self.waiting = 0

    def wait(self, timeout: timedelta | None = None) -> bool:
        self._network.wait(self)
        return True

    def is_completed(self) -> bool:
        return self.ended

    def result(self) -> Any:
        return self._result


class Network:
    """See the module. Threads that wait for anything of it must have entered it."""

    def __init__(
        self,
        size: int,
        *,
        rate: float,
        latency_s: float = 0.0,
        duplex: Duplex = Duplex.FULL,
        buffer_bytes: int = 0,
    ) -> None:
        """Connect `size` ranks.

        Args:
          size: ranks.
          rate: of a port, or of a wire, in bytes a second.
          latency_s: from the last byte's departure to its arrival.
          duplex: what messages share.
          buffer_bytes: a send ends when no more than so much of it has not left: a socket's
            buffer.
        """
        if rate <= 0 or latency_s < 0:
            raise ValueError(f"rate must be positive, latency_s not negative: {rate}, {latency_s}")
        self.size, self.rate, self.latency_s, self.duplex = size, rate, latency_s, duplex
        self.buffer_bytes = buffer_bytes
        self._changed = threading.Condition()
        # ---- under the condition ----
        self.carried = 0
        """Bytes on the wire so far, of all ranks."""
        self._now = 0.0
        self._running = 0
        self._free: dict[Hashable, float] = defaultdict(float)
        self._events: list[tuple[float, int, ModelledWork, Callable[[], None]]] = []
        self._number = itertools.count()
        self._pending: set[ModelledWork] = set()
        self._sent: dict[Hashable, deque[torch.Tensor]] = defaultdict(deque)
        self._posted: dict[Hashable, deque[tuple[torch.Tensor, ModelledWork]]] = defaultdict(deque)
        self._calls: dict[int, dict[int, tuple[ModelledWork, Any]]] = defaultdict(dict)

    def group(self, rank: int) -> "ModelledGroup":
        """The process group of one rank."""
        return ModelledGroup(self, rank)

    def enter(self, threads: int = 1) -> None:
        """So many threads run: time stands still until all of them wait, or have left.

        Let all enter before the first runs, or time may run ahead of those that are late.
        """
        with self._changed:
            self._running += threads

    def leave(self) -> None:
        """The calling thread does not wait for anything of this network any more."""
        with self._changed:
            self._running -= 1
            self._pass_time()

    @contextmanager
    def entered(self) -> Iterator[None]:
        """`enter` and `leave`."""
        self.enter()
        try:
            yield
        finally:
            self.leave()

    def now(self) -> float:
        """Seconds since the network was made."""
        return self._now

    def sleep(self, seconds: float) -> None:
        """Let so much time pass: computing."""
        with self._changed:
            work = self._new()
            self._at(self._now + seconds, work, lambda: None)
        self.wait(work)

    def event(self) -> ModelledWork:
        """Something that a thread of this network will do, for others to wait for."""
        with self._changed:
            return self._new()

    def happened(self, event: ModelledWork) -> None:
        """It is done."""
        with self._changed:
            if event in self._pending:
                self._end(event, None)

    def break_off(self, reason: str) -> None:
        """End all that is pending, everywhere, as the loss of a member would. New calls work."""
        with self._changed:
            for table in (self._sent, self._posted, self._calls):
                table.clear()
            for work in list(self._pending):
                self._end(work, GenerationAborted(reason))

    def wait(self, work: ModelledWork) -> None:
        """Let time pass until `work` has ended.

        Raises:
          GenerationAborted: it was broken off, or nothing will ever end it.
        """
        with self._changed:
            if not work.ended:
                work.waiting += 1
                self._running -= 1
                self._pass_time()
                while not work.ended:
                    self._changed.wait()
            if work.error is not None:
                raise work.error

    # -- what groups ask for ------------------------------------------------------------------

    def send(self, source: int, target: int, tag: int, tensor: torch.Tensor) -> ModelledWork:
        """Let a copy of `tensor` travel; the work ends when the buffer has taken the rest."""
        data = tensor.detach().clone().reshape(-1)
        took = data.nbytes / self.rate if source != target else 0.0
        departs, arrives = self._ends(source, target)

        def arrive() -> None:
            self._sent[source, target, tag].append(data)
            self._match(source, target, tag)

        def enter() -> None:
            # A switch between the two buffers what the receiver's end has no room for yet.
            end = self._now
            if arrives != departs:
                end = self._free[arrives] = max(end, self._free[arrives] + took)
            self._at(end + self.latency_s, self._new(), arrive)

        with self._changed:
            left = self._free[departs] = max(self._now, self._free[departs]) + took
            self.carried += data.nbytes if source != target else 0
            work = self._new([tensor])
            self._at(left - self.buffer_bytes / self.rate, work, lambda: None)
            self._at(left, self._new(), enter)
        return work

    def recv(self, source: int, target: int, tag: int, tensor: torch.Tensor) -> ModelledWork:
        """Fill `tensor` with the next message that has this tag."""
        with self._changed:
            work = self._new([tensor])
            self._posted[source, target, tag].append((tensor, work))
            self._match(source, target, tag)
        return work

    def collect(
        self,
        rank: int,
        seq: int,
        arguments: Any,
        wire: float,
        compute: Callable[[list[Any]], None],
    ) -> ModelledWork:
        """One rank's part of a collective; with the last one it begins.

        Args:
          rank: who calls.
          seq: which of its collectives this is.
          arguments: handed to `compute`, a list of all ranks' by rank.
          wire: bytes that each rank sends.
          compute: does it, in place.
        """
        with self._changed:
            work = self._new(arguments)
            calls = self._calls[seq]
            calls[rank] = (work, arguments)
            if len(calls) == self.size:
                del self._calls[seq]
                ranks = range(self.size)
                end = max(self._share(r, wire) for r in ranks)
                acts = [lambda: compute([calls[r][1] for r in ranks])]
                acts += [lambda: None] * (self.size - 1)
                for r, act in zip(ranks, acts, strict=True):
                    self._at(end + self.latency_s, calls[r][0], act)
        return work

    # -- under the condition ------------------------------------------------------------------

    def _new(self, result: object = None) -> ModelledWork:
        work = ModelledWork(self, result)
        self._pending.add(work)
        return work

    def _ends(self, source: int, target: int) -> tuple[Hashable, Hashable]:
        """What a message takes at its source, and then at its target."""
        match self.duplex:
            case Duplex.WIRES:
                return (source, target), (source, target)
            case Duplex.FULL:
                return ("out", source), ("in", target)
            case Duplex.HALF:
                return source, target

    def _share(self, rank: int, nbytes: float) -> float:
        """When a rank is through with its part of a collective, which sends and receives alike."""
        match self.duplex:
            case Duplex.WIRES:
                mine: list[Hashable] = [(rank, (rank + 1) % self.size)]
            case Duplex.FULL:
                mine = [("out", rank), ("in", rank)]
            case Duplex.HALF:
                mine = [rank]
        took = nbytes / self.rate * (2 if self.duplex is Duplex.HALF else 1)
        end = max(self._now, *(self._free[one] for one in mine)) + took
        self._free.update(dict.fromkeys(mine, end))
        self.carried += int(nbytes)
        return end

    def _match(self, *way: int) -> None:
        sent, posted = self._sent[way], self._posted[way]
        while sent and posted:
            data, (into, work) = sent.popleft(), posted.popleft()

            def deliver(data: torch.Tensor = data, into: torch.Tensor = into) -> None:
                into.detach().view(-1).copy_(data)

            self._at(self._now, work, deliver)

    def _at(self, when: float, work: ModelledWork, act: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._number), work, act))

    def _pass_time(self) -> None:
        """Once everybody waits: go to the next event, until somebody runs again."""
        while self._running == 0 and self._pending:
            if not self._events:
                for work in [w for w in self._pending if w.waiting]:
                    self._end(work, GenerationAborted("all ranks wait, and nothing is under way"))
                return
            when, _, work, act = heapq.heappop(self._events)
            if work in self._pending:
                self._now = max(self._now, when)
                act()
                self._end(work, None)

    def _end(self, work: ModelledWork, error: Exception | None) -> None:
        self._pending.discard(work)
        work.ended, work.error = True, error
        # Who is about to wake up runs already: time must not go on meanwhile.
        self._running += work.waiting
        work.waiting = 0
        self._changed.notify_all()


class ModelledGroup(dist.ProcessGroup):
    """One rank of a `Network`. Its methods return at once, as those of `FtkitProcessGroup`."""

    def __init__(self, network: Network, rank: int) -> None:
        super().__init__(rank, network.size)  # type: ignore[call-arg]
        self.network, self._rank = network, rank
        self._seq = itertools.count()

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self.network.size

    def name(self) -> str:
        return "modelled"

    def getBackendName(self) -> str:  # noqa: N802 - torch's name
        return "modelled"

    def send(self, tensors: Sequence[torch.Tensor], dst: int, tag: int = 0) -> ModelledWork:
        (tensor,) = tensors
        return self.network.send(self._rank, dst, tag, tensor)

    def recv(self, tensors: Sequence[torch.Tensor], src: int, tag: int = 0) -> ModelledWork:
        (tensor,) = tensors
        return self.network.recv(src, self._rank, tag, tensor)

    def allreduce(self, tensors: Sequence[torch.Tensor], opts: Any = None) -> ModelledWork:
        (tensor,) = tensors
        largest = getattr(opts, "reduceOp", None) == dist.ReduceOp.MAX

        def compute(every: list[torch.Tensor]) -> None:
            stacked = torch.stack([t.detach() for t in every])
            whole = stacked.amax(0) if largest else stacked.sum(0)
            for one in every:
                one.detach().copy_(whole)

        n = self.size()
        return self._collect(tensor, 2 * (n - 1) / n * tensor.nbytes, compute)

    def _reduce_scatter_base(
        self, output: torch.Tensor, whole: torch.Tensor, opts: Any = None
    ) -> ModelledWork:
        def compute(every: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
            total = torch.stack([given.detach() for _, given in every]).sum(0)
            for (out, _), part in zip(every, total.chunk(len(every)), strict=True):
                out.detach().view(-1).copy_(part.reshape(-1))

        n = self.size()
        return self._collect((output, whole), (n - 1) / n * whole.nbytes, compute)

    def _allgather_base(
        self, whole: torch.Tensor, mine: torch.Tensor, opts: Any = None
    ) -> ModelledWork:
        def compute(every: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
            joined = torch.cat([given.detach().reshape(-1) for _, given in every])
            for out, _ in every:
                out.detach().view(-1).copy_(joined)

        n = self.size()
        return self._collect((whole, mine), (n - 1) / n * whole.nbytes, compute)

    def barrier(self, opts: Any = None) -> ModelledWork:
        return self._collect(None, 0, lambda every: None)

    def abort(self) -> None:
        self.network.break_off("ProcessGroup.abort() was called")

    def _collect(
        self, arguments: Any, wire: float, compute: Callable[[list[Any]], None]
    ) -> ModelledWork:
        return self.network.collect(self._rank, next(self._seq), arguments, wire, compute)
