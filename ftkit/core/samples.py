"""Samples: what a few of them say of all: quantiles, and the interval of a share. Pure."""

import math
from collections.abc import Sequence


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest of `values` that at least `share` of them do not exceed (nearest rank).

    Always one of the values, of which there must be at least one.
    """
    ordered = sorted(values)
    return ordered[max(1, math.ceil(share * len(ordered))) - 1]


def wilson(hits: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share, `hits` of `count` (Wilson 1927). Of none: (0, 1)."""
    if count == 0:
        return 0.0, 1.0
    z = 1.959964
    share, z2 = hits / count, z * z
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = z / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count * count))
    # Rounding must not leave the share itself out.
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))
