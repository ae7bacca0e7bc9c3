"""Recut: which layers each pipeline stage holds, so that the slowest stage is as fast as can be.

Pure. A stage whose node lost a rank works through a micro-batch slower; layers go to its neighbours
until it is even again. The minimax partition is found by dynamic programming over (stages,
layers), O(S L^2), with memory limits; of equal cuts the one that moves the least from the
cut there is. ElasWave (arXiv 2510.00606) calls this the graph dimension.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One layer, as measured."""

    seconds: float
    """A micro-batch, forward and backward, on one rank of full speed."""
    state_bytes: int
    """Parameters and optimizer state, of all data-parallel ranks together."""
    memory_bytes: int = 0
    """What it needs on each rank of its stage: its share of state, activations in flight."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One pipeline stage's ranks."""

    speed: float = 1.0
    """Against a full stage: 0.75 where one of four ranks is gone."""
    memory_bytes: int | None = None
    """Of each rank; None: any."""

    def __post_init__(self) -> None:
        if not 0 < self.speed < math.inf:
            raise ValueError(f"a stage has a speed above 0, got {self.speed}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """Layers divided into stages."""

    bounds: tuple[int, ...]
    """Stage s holds layers bounds[s] to bounds[s + 1]."""
    slowest_s: float
    """A micro-batch in the slowest stage: what the pipeline's pace is."""


def holder(bounds: Sequence[int], layer: int) -> int:
    """The stage that holds this layer, cut at `bounds`."""
    return next(s for s in range(len(bounds) - 1) if layer < bounds[s + 1])


def slowest(seconds: Sequence[float], bounds: Sequence[int]) -> float:
    """Seconds of a micro-batch in the slowest stage, from those of each layer."""
    return max(sum(seconds[bounds[s] : bounds[s + 1]]) for s in range(len(bounds) - 1))


def recut(
    layers: Sequence[Layer],
    stages: Sequence[Stage],
    *,
    now: Sequence[int] | None = None,
    held: Sequence[range] | None = None,
) -> Cut:
    """The cut with the fastest slowest stage; every stage holds a layer at least.

    Args:
      layers: in order.
      stages: in order.
      now: bounds of the cut in force: of equal cuts the one that moves fewest bytes is taken.
      held: the same as layers by stage, where a stage between others was lost.

    Raises:
      ValueError: there are fewer layers than stages, or they do not fit into memory.
    """
    count, parts = len(layers), len(stages)
    if count < parts or not parts:
        raise ValueError(f"{count} layers cannot fill {parts} stages")
    seconds = list(itertools.accumulate((x.seconds for x in layers), initial=0.0))
    memory = list(itertools.accumulate((x.memory_bytes for x in layers), initial=0))
    if held is None and now is not None:
        held = [range(now[s], now[s + 1]) for s in range(min(parts, len(now) - 1))]
    foreign = _foreign(layers, held, parts)

    def cost(stage: int, first: int, last: int) -> float:
        limit = stages[stage].memory_bytes
        if limit is not None and memory[last] - memory[first] > limit:
            return math.inf
        return (seconds[last] - seconds[first]) / stages[stage].speed

    # First the best pace, then of all cuts with it the one that moves the least.
    pace = [[math.inf] * (count + 1) for _ in range(parts + 1)]
    pace[0][0] = 0.0
    for s, end in itertools.product(range(parts), range(1, count + 1)):
        pace[s + 1][end] = min(max(pace[s][b], cost(s, b, end)) for b in range(end))
    best = pace[parts][count]
    if math.isinf(best):
        raise ValueError(f"{count} layers do not fit into the memory of {parts} stages")
    allowed = best * (1 + 1e-12)
    moved = [[math.inf] * (count + 1) for _ in range(parts + 1)]
    begin = [[0] * (count + 1) for _ in range(parts + 1)]
    moved[0][0] = 0.0
    for s, end in itertools.product(range(parts), range(1, count + 1)):
        moved[s + 1][end], begin[s + 1][end] = min(
            (moved[s][b] + foreign[s][end] - foreign[s][b], b)
            if cost(s, b, end) <= allowed
            else (math.inf, b)
            for b in range(end)
        )
    bounds = [count]
    for s in range(parts, 0, -1):
        bounds.append(begin[s][bounds[-1]])
    return Cut(bounds=tuple(reversed(bounds)), slowest_s=best)


def _foreign(layers: Sequence[Layer], held: Sequence[range] | None, parts: int) -> list[list[int]]:
    """Of each stage, the bytes of the first k layers that it does not hold now."""
    if held is None:
        return [[0] * (len(layers) + 1) for _ in range(parts)]
    return [
        list(
            itertools.accumulate(
                (
                    0 if s < len(held) and i in held[s] else layer.state_bytes
                    for i, layer in enumerate(layers)
                ),
                initial=0,
            )
        )
        for s in range(parts)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Moves:
    """What a change of cut moves, by how the stages' state is sharded. Bytes."""

    layers: tuple[int, ...]
    """Layers that change their stage."""
    contiguous: float
    """Each stage's state one flat row, cut over its ranks: one layer shifts all the others."""
    interleaved: float
    """Each layer cut over all ranks: rank d of one stage sends to rank d of the other alone."""
    contiguous_rank: float
    """The most one rank sends."""
    interleaved_rank: float


def moves(
    layers: Sequence[Layer], before: Sequence[int], after: Sequence[int], *, ranks: int
) -> Moves:
    """What it takes to change from one cut to another, with `ranks` data-parallel ranks a stage.

    Both placements are worked out, from which bytes each rank holds before and after.
    """
    sizes = [x.state_bytes for x in layers]
    moved = [i for i in range(len(layers)) if holder(before, i) != holder(after, i)]
    contiguous: dict[tuple[int, int], float] = {}
    for stage in range(len(after) - 1):
        for i in range(after[stage], after[stage + 1]):
            # Overlap of each new owner's range with each old owner's, within this layer.
            old, new = holder(before, i), stage
            for (r, a, b), (q, c, d) in itertools.product(
                _pieces(sizes, before, old, i, ranks), _pieces(sizes, after, new, i, ranks)
            ):
                both = min(b, d) - max(a, c)
                if both > 0 and (old, r) != (new, q):
                    contiguous[old, r] = contiguous.get((old, r), 0.0) + both
    interleaved = [0.0] * (len(before) - 1)
    for i in moved:
        interleaved[holder(before, i)] += sizes[i]
    return Moves(
        layers=tuple(moved),
        contiguous=sum(contiguous.values()),
        interleaved=sum(interleaved),
        contiguous_rank=max(contiguous.values(), default=0.0),
        interleaved_rank=max(interleaved) / ranks,
    )


def _pieces(
    sizes: Sequence[int], bounds: Sequence[int], stage: int, layer: int, ranks: int
) -> list[tuple[int, float, float]]:
    """Which rank holds which bytes of `layer`, where the stage is one flat row cut evenly."""
    first = sum(sizes[bounds[stage] : layer])
    share = sum(sizes[bounds[stage] : bounds[stage + 1]]) / ranks
    found = []
    for rank in range(ranks):
        low = max(0.0, rank * share - first)
        high = min(float(sizes[layer]), (rank + 1) * share - first)
        if low < high:
            found.append((rank, low, high))
    return found
