"""Flights: the transfers of one overlapped operation, of which none outlives it.

An operation owns its buffers until every transfer has ended, well or not: at the first failure
the rest are drained, and one error comes out. A failure on this side ends the operation on the
others too, who would wait for bytes that never come.
"""

import contextlib
import logging
import time
from collections.abc import Callable
from copy import deepcopy
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import AllgatherOptions

from ftkit.core.errors import GenerationAborted

logger = logging.getLogger(__name__)

#: Tags of overlapped operations; below are the user's.
TAGS = 0x7F10_0000

#: After an abort what is in flight must end within this.
DRAIN_S = 10.0


class Flight:
    """One transfer. Keeps its tensor."""

    __slots__ = ("_ended", "_flights", "_work", "tensor")

    def __init__(self, flights: "Flights", work: Any, tensor: torch.Tensor) -> None:
        self._flights, self._work, self.tensor = flights, work, tensor
        self._ended = False

    def wait(self) -> torch.Tensor:
        """Block until it has ended; its tensor.

        Raises:
          GenerationAborted: the operation is over, here and everywhere.
        """
        if not self._ended:
            # Once: a receive of gloo's that is waited for again waits for another message.
            self._ended = True
            try:
                self._work.wait()
            except (RuntimeError, OSError) as error:
                raise self._flights.broken(error) from error
        return self.tensor

    def drain(self) -> None:
        """Block until it has ended, however it does, or until `DRAIN_S` are over."""
        if not self._ended:
            self._ended = True
            try:
                self._work.wait(timedelta(seconds=DRAIN_S))
            except Exception as error:  # noqa: BLE001 - one of them is raised already
                logger.debug("drained: %s", error)


class Flights:
    """`with Flights(group, "what") as flights:` - on its end nothing is in flight."""

    def __init__(
        self, group: Any, name: str, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """Begin an operation.

        Args:
          group: a process group with `send`, `recv` and `allreduce`.
          name: what errors call it.
          clock: for `mark`.
        """
        self.group, self._name, self._clock = group, name, clock
        self.marked = 0.0
        """When the first part of the operation was over."""
        self.rank, self.size = int(group.rank()), int(group.size())
        self._open: list[Flight] = []
        inner = getattr(group, "group", None)
        if inner is not None:
            inner.meetings += 1

    def send(self, tensor: torch.Tensor, target: int, tag: int) -> Flight:
        """Let a contiguous tensor go to a rank of the group; it must stay as it is."""
        return self._fly(lambda: self.group.send([tensor], target, TAGS + tag), tensor)

    def recv(self, into: torch.Tensor, source: int, tag: int) -> Flight:
        """Take what that rank sends with this tag into a contiguous tensor."""
        return self._fly(lambda: self.group.recv([into], source, TAGS + tag), into)

    def all_reduce(self, tensor: torch.Tensor) -> Flight:
        """Sum a tensor over all ranks, in place."""
        return self._fly(lambda: self.group.allreduce([tensor], dist.AllreduceOptions()), tensor)

    def reduce_scatter(self, out: torch.Tensor, whole: torch.Tensor) -> Flight:
        """Sum `whole` over all ranks, and keep our even part of its rows."""
        options = dist.ReduceScatterOptions()
        return self._fly(lambda: self.group._reduce_scatter_base(out, whole, options), out)

    def all_gather(self, whole: torch.Tensor, mine: torch.Tensor) -> Flight:
        """Everybody's rows, which are as many as ours."""
        options = AllgatherOptions()
        return self._fly(lambda: self.group._allgather_base(whole, mine, options), whole)

    def mark(self) -> None:
        """All is computed, and the rest is waiting; or all is there, and the rest is computing."""
        self.marked = self._clock()

    def broken(self, error: BaseException) -> GenerationAborted:
        """What to raise, once all that is in flight has ended."""
        self.drain()
        return GenerationAborted(f"{self._name} over rank {self.rank} of {self.size}: {error}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.finish()
            return
        if not isinstance(error, GenerationAborted):
            with contextlib.suppress(Exception):
                self.group.abort()
        self.drain()

    def finish(self) -> None:
        """Block until all that is in flight has ended well; what `with` does at its end."""
        while self._open:
            self._open[0].wait()
            del self._open[0]

    def drain(self) -> None:
        """Block until all that is in flight has ended, however it does."""
        flights, self._open = self._open, []
        for flight in flights:
            flight.drain()

    def _fly(self, start: Callable[[], Any], tensor: torch.Tensor) -> Flight:
        try:
            flight = Flight(self, start(), tensor)
        except GenerationAborted:
            self.drain()
            raise
        self._open.append(flight)
        return flight


def copied(module: nn.Module, group: Any, memo: dict[int, Any]) -> Any:
    """`deepcopy` of a module whose ranks are not copied with it."""
    memo[id(group)] = group
    made = memo[id(module)] = object.__new__(type(module))
    vars(made).update(deepcopy(vars(module), memo))
    return made


def of(group: Any) -> Any:
    """The process group itself: None is the default one."""
    if group is not None:
        return group
    default = dist.group.WORLD
    if default is None:
        raise ValueError("there is no default process group; pass group= or initialise one")
    return default
