"""Micro-batches of any size: which samples of the global batch are played together. Pure.

In `scaled` mode a slot is one sample, so that work is divided to the sample, and a rank plays as many
of its slots at once as it has memory for. `bitwise` knows no such choice: there a slot is a
micro-batch, whose shape never changes.
"""

from collections.abc import Sequence
from itertools import pairwise

from ftkit.core.ids import Slot

Together = tuple[Slot, ...]
"""Slots of one micro-batch; none where a rank only plays along."""


def together(held: Sequence[Slot], most: int) -> list[Together]:
    """Cut a rank's slots, in rising order, into micro-batches of `most` at most.

    As few as can be, as equal as can be, each of neighbours.
    """
    found, start = list[Together](), 0
    ends = [at + 1 for at, (a, b) in enumerate(pairwise(held)) if b != a + 1]
    for end in [*ends, len(held)] if held else []:
        found += _parts(held[start:end], -(-(end - start) // most))
        start = end
    return found


def rounds(slots: int, ranks: int, rank: int, most: int) -> list[Together]:
    """The micro-batches of one rank where all ranks play equally many, as those of shards do.

    Every rank holds its even share, to a slot, in as few rounds as the largest share takes.

    Args:
      slots: of the global batch.
      ranks: in the world.
      rank: this one.
      most: slots of a micro-batch, at most.
    """
    share = [Slot(s) for s in range(rank * slots // ranks, (rank + 1) * slots // ranks)]
    largest = -(-slots // ranks)
    return _parts(share, -(-largest // most))


def _parts(run: Sequence[Slot], count: int) -> list[Together]:
    cuts = [-(-i * len(run) // count) for i in range(count + 1)]
    return [tuple(run[a:b]) for a, b in pairwise(cuts)]
