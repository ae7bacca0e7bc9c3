"""Swapped: a pipeline whose outer stages change places on every other micro-batch (CheckFree+). Pure.

arXiv 2506.15461: so the second stage learns the first one's part as well, and the last but one the
last one's, and each can stand in for the other. What changes places are *layers*, those of the outer
stages of the full world: the bits then depend on no cut. The first layer and the last, the embedding and
its inverse, stay where they are. ::

    even   0 | A | B | ... | C | D | last
    odd    0 | B | A | ... | D | C | last

A micro-batch goes from rank to rank along its route, and back. In which order each rank plays its
passes is one list that all ranks compute alike, of a pipeline played through in the mind: each pass
as early as it can be, backward first. Of each layer the slots come in order, forward and backward,
so that its gradients and buffers are the same on every cut.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ftkit.recovery.recut import holder


class Segment(NamedTuple):
    """What a micro-batch meets on one rank between two hops."""

    rank: int
    layers: tuple[int, ...]


class Pass(NamedTuple):
    """One rank's work on a micro-batch: the segment `hop` of its route."""

    slot: int
    hop: int
    backward: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Swap:
    """The layers that change places."""

    first: tuple[range, range]
    """Of the first stage, without the first layer, and of the second."""
    last: tuple[range, range]
    """Of the last stage but one, and of the last, without the last layer."""

    @classmethod
    def of(cls, bounds: Sequence[int]) -> "Swap":
        """Those of a full world cut at `bounds`.

        Raises:
          ValueError: an outer stage has nothing that could change places, or is in two pairs.
        """
        stages, end = len(bounds) - 1, bounds[-1]
        if stages != 2 and stages < 4:
            raise ValueError(
                f"{stages} stages have no two pairs of outer ones to swap: CheckFree+ needs 2, or 4 or "
                "more"
            )
        held = [range(max(1, a), min(end - 1, b)) for a, b in itertools.pairwise(bounds)]
        pairs = (held[0], held[1]), (held[-2], held[-1])
        if not all(map(len, (*pairs[0], *pairs[1]))):
            raise ValueError(
                f"cut at {list(bounds)} an outer stage has no layer beside the first or the last of "
                "all, which stay where they are: CheckFree+ needs one in each"
            )
        return cls(first=pairs[0], last=pairs[1])

    def route(self, layers: int, *, odd: bool) -> tuple[int, ...]:
        """The order in which a micro-batch meets the layers."""
        (a, b), (c, d) = self.first, self.last
        if not odd:
            return tuple(range(layers))
        if self.first == self.last:
            return (0, *b, *a, layers - 1)
        return (0, *b, *a, *range(b.stop, c.start), *d, *c, layers - 1)

    def learned(self, made: int, of: int) -> bool:
        """Whether layer `of` has played the part of layer `made`."""
        pairs = (self.first, self.last)
        return any((made in a and of in b) or (made in b and of in a) for a, b in pairs)


def segments(route: Sequence[int], bounds: Sequence[int]) -> tuple[Segment, ...]:
    """A route over ranks that hold layers as cut at `bounds`."""
    found = list[tuple[int, list[int]]]()
    for layer in route:
        rank = holder(bounds, layer)
        if not found or found[-1][0] != rank:
            found.append((rank, []))
        found[-1][1].append(layer)
    return tuple(Segment(rank, tuple(layers)) for rank, layers in found)


def orders(
    routes: Sequence[Sequence[Segment]], *, ranks: int, depth: int
) -> tuple[tuple[Pass, ...], ...]:
    """Which passes each rank plays, in order: nobody waits for ever, if sends do not.

    Args:
      routes: of each micro-batch, by slot. All begin on one rank.
      ranks: how many there are.
      depth: micro-batches under way at once, at most: what a rank keeps of activations.
    """
    chains = [
        [Pass(s, h, False) for h in range(len(route))]
        + [Pass(s, h, True) for h in reversed(range(len(route)))]
        for s, route in enumerate(routes)
    ]
    at = [0] * len(chains)  # the next pass of each
    ends = [0.0] * len(chains)  # when the one before was over
    free = [0.0] * ranks
    played = dict[tuple[int, bool], int]()  # slots through with a layer, by direction
    done = 0
    made: list[list[Pass]] = [[] for _ in range(ranks)]
    while done < len(chains):
        ready = list[tuple[float, bool, Pass]]()
        for slot in range(done, min(done + depth, len(chains))):
            if at[slot] == len(chains[slot]):
                continue
            each = chains[slot][at[slot]]
            segment = routes[slot][each.hop]
            if all(played.get((layer, each.backward), 0) == slot for layer in segment.layers):
                start = max(free[segment.rank], ends[slot])
                ready.append((start, not each.backward, each))
        # The oldest micro-batch can always go on, so there is one.
        start, _, each = min(ready)
        segment = routes[each.slot][each.hop]
        # A backward pass costs about two forward passes.
        free[segment.rank] = ends[each.slot] = start + len(segment.layers) * (1 + each.backward)
        for layer in segment.layers:
            played[layer, each.backward] = each.slot + 1
        at[each.slot] += 1
        made[segment.rank].append(each)
        while done < len(chains) and at[done] == len(chains[done]):
            done += 1
    return tuple(map(tuple, made))
