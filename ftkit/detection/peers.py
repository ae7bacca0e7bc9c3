"""Peers: how a member's step stands to those of members that do the same work.

Everything is a logarithm, so that +10 % means the same at any step time. The one judged is left
out of the median it is held against.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Final

from ftkit.core.ids import MemberId

#: Of fewer members, oneself included, no majority can say who is the odd one.
PEERS_MIN: Final = 3

#: A larger minority is no minority: then the group has two kinds of members, and none is slow.
MINORITY_MAX: Final = 0.35

#: Nothing takes so long, in whatever unit, nor so short: the ratio of two such is no number.
_ABSURD: Final = 1e15


def residuals(values: Mapping[MemberId, float]) -> dict[MemberId, float]:
    """Each member's logarithm less the median of the others'; needs two members or more."""
    ordered = sorted(values.values())
    place = {value: i for i, value in enumerate(ordered)}
    return {m: v - _median_without(ordered, place[v]) for m, v in values.items()}


def split(levels: Mapping[MemberId, float], *, least: float) -> frozenset[MemberId] | None:
    """The upper ones where a group falls into two halves, neither of them a small minority.

    Args:
      levels: each member's usual residual.
      least: the gap that is one, in log units.

    Returns:
      The members above the widest gap of those that leave no small minority on either side; None
      where there is none.
    """
    ranked = sorted(levels, key=lambda m: levels[m])
    smallest = MINORITY_MAX * len(ranked)
    gaps = [
        (levels[ranked[i]] - levels[ranked[i - 1]], i)
        for i in range(1, len(ranked))
        if i > smallest and len(ranked) - i > smallest
    ]
    width, place = max(gaps, default=(0.0, 0))
    return frozenset(ranked[place:]) if width >= least else None


def log_or_none(value: float) -> float | None:
    """The logarithm of a duration; None for one that is none (negative, not finite, or absurd)."""
    return math.log(value) if 1 / _ABSURD < value < _ABSURD else None


def _median_without(ordered: Sequence[float], place: int) -> float:
    """The median of a sorted sequence without the one at `place`."""
    count = len(ordered) - 1
    half = count // 2

    def at(i: int) -> float:
        return ordered[i if i < place else i + 1]

    return at(half) if count % 2 else 0.5 * (at(half - 1) + at(half))
