"""Auto: `chunks="auto"` of one process group: a tuner for each operation and shape."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from ftkit.collectives.overlap.flights import Flights
from ftkit.collectives.overlap.tuning import ChunkTuner, Cut


def generation_of(group: Any) -> int:
    """The generation of a group of ftkit's; 0 for others, whose members do not change."""
    inner = getattr(group, "group", None)
    return inner.world.generation if inner is not None else 0


class AutoChunks:
    """The tuners of one rank in one group. One thread's object."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        """Know nothing yet. `clock` gives seconds."""
        self.clock = clock
        self._tuners: dict[tuple[object, ...], ChunkTuner] = {}

    def tuner(self, group: Any, *what: object) -> ChunkTuner:
        """The one for an operation and what all ranks share of its shapes, and none before.

        After a change of membership all begin anew: ranks were not all at the same call.
        """
        key = (generation_of(group), int(group.size()), *what)
        return self._tuners.setdefault(key, ChunkTuner(int(group.size())))


Chunks: TypeAlias = int | Literal["auto"] | AutoChunks

_shared: WeakKeyDictionary[Any, AutoChunks] = WeakKeyDictionary()


@dataclass(slots=True)
class Running:
    """An operation that runs: its transfers, and how it is cut."""

    flights: Flights
    cut: Cut


@contextmanager
def running(
    group: Any, name: str, chunks: Chunks, *shapes: object, gathers: bool = False
) -> Iterator[Running]:
    """The transfers of one call and its cut; tells the tuner how long it took.

    Args:
      group: the process group.
      name: of the operation.
      chunks: as the caller gave it.
      shapes: what the same tuner may be used for; only of what all ranks share.
      gathers: whether the first part of it is the exchange (`Flights.mark`).
    """
    if isinstance(chunks, int):
        if chunks < 1:
            raise ValueError(f"chunks are counted from 1, got {chunks}")
        with Flights(group, name) as flights:
            yield Running(flights, Cut(chunks, eager=True))
        return
    if chunks != "auto" and not isinstance(chunks, AutoChunks):
        raise ValueError(f'chunks must be a number from 1 or "auto", got {chunks!r}')
    auto = _shared.setdefault(group, AutoChunks()) if chunks == "auto" else chunks
    tuner = auto.tuner(group, name, *shapes)
    began = auto.clock()
    with Flights(group, name, auto.clock) as flights:
        yield Running(flights, tuner.cut)
    total_s = auto.clock() - began
    first_s = flights.marked - began
    if ask := tuner.note(total_s - first_s if gathers else first_s, total_s):
        told = torch.tensor(ask, dtype=torch.float64)
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp(dist.ReduceOp.MAX)
        group.allreduce([told], options).wait()
        tuner.agree(told.tolist())
