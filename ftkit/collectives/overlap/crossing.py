"""Crossing: what follows a woven layer. Rows are summed, changed by their owner, and gathered.

A reduce-scatter, a change and an all-gather, as messages in pieces: a piece that was changed goes
out while the next one still comes in. Crossings find their messages by tag, so that two may be
under way at once, and the link goes on with one while the other is being changed. Sums are taken
in the order of ranks, in float32 where rows are of half precision.
"""

from collections.abc import Callable
from typing import Any

import torch

from ftkit.collectives.overlap.exchange import summed
from ftkit.collectives.overlap.flights import Flight, Flights
from ftkit.collectives.overlap.parts import pieces, sources, targets

Tensor = torch.Tensor

Change = Callable[[Tensor, int, int], Tensor]
"""The summed rows, and which of ours they are, to rows as many and as wide; its own, and contiguous."""

#: A message costs more than the wait that it saves where it is smaller than this.
_PIECE_BYTES = 96 << 10
_PIECES_MAX = 2

#: A layer may run an operation of its own between the same ranks, whose tags begin at 0.
_TAGS = 1 << 16


class Crossing:
    """See the module. Begun and ended by one thread, changed by another between."""

    def __init__(self, group: Any, name: str, part: Tensor, *, lane: int, cut: bool = True) -> None:
        """Let the others' rows go, and await theirs. Does not block.

        Args:
          group: the ranks.
          name: what errors call it.
          part: rows to be summed over ranks, as many for each rank; contiguous, and left as they
            are until `end`.
          lane: tells crossings apart that are under way at once.
          cut: whether rows travel in pieces.
        """
        self._flights = flights = Flights(group, name)
        rank, size = flights.rank, flights.size
        self._part, self._each = part, part.shape[0] // size
        count = part[: self._each].nbytes // _PIECE_BYTES
        most = _PIECES_MAX if cut else 1
        self._spans = list(pieces(0, self._each, max(1, min(count, most))))
        self._tag = _TAGS + 2 * _PIECES_MAX * lane
        self._whole = torch.empty_like(part)
        self._came: dict[tuple[int, int], Flight] = {}
        self._gathered: list[Flight] = []
        for source in sources(size, rank):
            for i, (a, b) in enumerate(self._spans):
                into = part.new_empty(b - a, part.shape[1])
                self._came[source, i] = flights.recv(into, source, self._tag + i)
            for i, (a, b) in enumerate(self._spans):
                rows = self._of(self._whole, source)[a:b]
                tag = self._tag + _PIECES_MAX + i
                self._gathered.append(flights.recv(rows, source, tag))
        for i, (a, b) in enumerate(self._spans):
            for target in targets(size, rank):
                flights.send(self._of(part, target)[a:b], target, self._tag + i)

    def change(self, change: Change) -> None:
        """Sum our rows as they come, change them, and let them go. Blocks until the last did."""
        flights = self._flights
        rank, size = flights.rank, flights.size
        mine, whole = self._of(self._part, rank), self._of(self._whole, rank)
        for i, (a, b) in enumerate(self._spans):
            own = mine[a:b]
            total = own
            if size > 1:
                total = torch.empty_like(own)
                terms = (own if r == rank else self._came.pop((r, i)) for r in range(size))
                summed(list(terms), total)
            whole[a:b] = change(total, a, b)
            for target in targets(size, rank):
                flights.send(whole[a:b], target, self._tag + _PIECES_MAX + i)

    def rows(self) -> Tensor:
        """Everybody's rows, once they were changed here. Blocks until they were elsewhere."""
        for flight in self._gathered:
            flight.wait()
        return self._whole

    def end(self) -> None:
        """Block until all that we sent has left."""
        self._flights.finish()

    def drain(self) -> None:
        """Block until nothing is under way any more: after an error, and an abort."""
        self._flights.drain()

    def _of(self, rows: Tensor, rank: int) -> Tensor:
        return rows[rank * self._each : (rank + 1) * self._each]
