"""Exchange: rows that travel while others are computed: reduce-scatter and all-gather, inside out.

Both sides cut alike (`parts`), so nothing but the rows is sent. Rows are two-dimensional
tensors; what goes to whom is a run of them. Sums are taken in the order of ranks, in float32
where rows are of half precision: they do not depend on what arrives first.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ftkit.collectives.overlap.flights import Flight, Flights
from ftkit.collectives.overlap.parts import (
    bounds,
    growing,
    pieces,
    shrinking,
    sources,
    targets,
)

Produce = Callable[[int, int], torch.Tensor]
"""The rows from a start to an end, newly made and contiguous."""

Consume = Callable[[int, int, torch.Tensor], None]
"""Uses rows from a start to an end, which are there."""

HALVES = (torch.bfloat16, torch.float16)


def scatter(
    flights: Flights,
    produce: Produce,
    whole: Sequence[int],
    *,
    unit: int = 1,
    chunks: int = 1,
    like: torch.Tensor,
    eager: bool = True,
    meanwhile: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """Sum over all ranks of what each produces; our rows of it. Blocks.

    Args:
      flights: of the operation.
      produce: makes the rows that are sent, in the order of `parts.targets`, and ours last.
      whole: rows and columns of all.
      unit: rows that stay together.
      chunks: messages to each rank.
      like: of the dtype and device of the rows.
      eager: whether a chunk goes as soon as it is made; otherwise all are made first.
      meanwhile: further work, done before we wait for what others send.

    Returns:
      shape (our rows, columns).
    """
    rank, size, columns = flights.rank, flights.size, whole[1]
    units = whole[0] // unit
    own = _rows(units, size, rank, unit)
    spans = [(a * unit, b * unit) for a, b in growing(own[0] // unit, own[1] // unit, size, chunks)]
    came = {
        (source, i): flights.recv(like.new_empty(b - a, columns), source, i)
        for source in sources(size, rank)
        for i, (a, b) in enumerate(spans)
    }
    late: list[tuple[torch.Tensor, int, int]] = []
    for target in targets(size, rank):
        start, end = _rows(units, size, target, unit)
        for i, (a, b) in enumerate(growing(start // unit, end // unit, size, chunks)):
            made = produce(a * unit, b * unit)
            if eager:
                flights.send(made, target, i)
            else:
                late.append((made, target, i))
    mine = produce(*own)
    flights.mark()
    for made, target, i in late:
        flights.send(made, target, i)
    meanwhile()
    for i, (a, b) in enumerate(spans if size > 1 else []):
        part = mine[a - own[0] : b - own[0]]
        summed([part if r == rank else came[r, i] for r in range(size)], part)
    return mine


def gather(
    flights: Flights,
    mine: torch.Tensor,
    rows: int,
    consume: Consume,
    *,
    unit: int = 1,
    chunks: int = 1,
    eager: bool = True,
) -> torch.Tensor:
    """Everybody's rows, each used as soon as it is there. Blocks.

    Args:
      flights: of the operation.
      mine: our rows, contiguous.
      rows: of all.
      consume: told of all rows, a run at a time; ours first.
      unit: rows that stay together.
      chunks: messages from each rank.
      eager: whether rows are used as they come; otherwise when all are there.

    Returns:
      shape (rows, columns), filled.
    """
    rank, size = flights.rank, flights.size
    whole = mine.new_empty(rows, mine.shape[1])
    units = rows // unit
    coming: list[tuple[int, int, Flight]] = []
    for source in sources(size, rank):
        start, end = _rows(units, size, source, unit)
        for i, (a, b) in enumerate(shrinking(start // unit, end // unit, size, chunks)):
            span = a * unit, b * unit
            coming.append((*span, flights.recv(whole[slice(*span)], source, i)))
    own = _rows(units, size, rank, unit)
    if mine.shape[0] != own[1] - own[0]:
        raise ValueError(
            f"rank {rank} of {size} has {own[1] - own[0]} of {rows} rows, not {mine.shape[0]}"
        )
    for target in targets(size, rank):
        for i, (a, b) in enumerate(shrinking(own[0] // unit, own[1] // unit, size, chunks)):
            flights.send(mine[a * unit - own[0] : b * unit - own[0]], target, i)
    whole[slice(*own)] = mine
    if not eager:
        for _, _, flight in coming:
            flight.wait()
    flights.mark()
    if own[0] < own[1]:
        consume(*own, mine)
    for a, b, flight in coming:
        consume(a, b, flight.wait())
    return whole


def reduce(
    flights: Flights,
    produce: Produce,
    rows: int,
    *,
    chunks: int = 1,
    eager: bool = True,
    meanwhile: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """Sum over all ranks of what each produces, on all of them: `scatter` where nobody has a part.

    A chunk is all-reduced while the next is made.
    """
    made: list[torch.Tensor] = []
    flying: list[Flight] = []
    for a, b in pieces(0, rows, chunks):
        made.append(produce(a, b))
        if eager:
            flying.append(flights.all_reduce(made[-1]))
    flights.mark()
    if not eager:
        flying = [flights.all_reduce(one) for one in made]
    meanwhile()
    for flight in flying:
        flight.wait()
    return made[0] if len(made) == 1 else torch.cat(made) if made else produce(0, 0)


def rows_of(group: Any, rows: int, unit: int) -> tuple[int, int]:
    """Which of all rows are ours: start and end."""
    return _rows(rows // unit, int(group.size()), int(group.rank()), unit)


def _rows(units: int, size: int, rank: int, unit: int) -> tuple[int, int]:
    start, end = bounds(units, size, rank)
    return start * unit, end * unit


def summed(terms: Sequence[torch.Tensor | Flight], into: torch.Tensor) -> None:
    """Add at least two terms, in their order; `into` may be one of them, the others stay."""
    values = (term.wait() if isinstance(term, Flight) else term for term in terms)
    first = total = next(values)
    if into.dtype in HALVES:
        total = first.float()
        for value in values:
            total += value
        into.copy_(total)
        return
    for number, value in enumerate(values, 2):
        if number == len(terms):
            torch.add(total, value, out=into)
        else:
            total = total + value if total is first else total.add_(value)
