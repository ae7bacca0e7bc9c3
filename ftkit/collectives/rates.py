"""Rates: how fast each member reaches each other one. A matrix, and what follows from it. Pure.

`rates[i, j]` is in bytes a second from i to j: float64, NaN where nobody has measured it, 0
where j cannot be reached. It need not be symmetric, and the diagonal says nothing.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]

#: An edge of the ring that became this much slower than it was planned with asks for a plan.
DROP = 0.3


def unknown(count: int) -> Matrix:
    """A matrix of which nothing is known."""
    return np.full((count, count), np.nan)


def pooled(rates: Matrix, hosts: Sequence[str]) -> tuple[list[str], Matrix]:
    """The same between hosts: a pair's rate is the best known one of its members.

    Returns:
      The hosts in order of first appearance, and their matrix; NaN on its diagonal.
    """
    names = list(dict.fromkeys(hosts))
    result = unknown(len(names))
    places = [np.flatnonzero([h == name for h in hosts]) for name in names]
    for a, rows in enumerate(places):
        for b, columns in enumerate(places):
            block = rates[np.ix_(rows, columns)]
            if a != b and not np.isnan(block).all():
                result[a, b] = np.nanmax(block)
    return names, result


def filled(rates: Matrix, hosts: Sequence[str]) -> Matrix:
    """The matrix to plan with: what is unknown is guessed, never too well.

    Between hosts a pair is as fast as the hosts' best known pair, or else as the median of
    all that is known: an unmeasured edge neither attracts nor repels. Within a host memory
    is as fast as the fastest.
    """
    names, between = pooled(rates, hosts)
    np.fill_diagonal(between, np.nan)
    known = between[~np.isnan(between)]
    between[np.isnan(between)] = np.median(known) if known.size else 1.0
    every = rates[~np.isnan(rates) & ~np.eye(len(hosts), dtype=bool)]
    np.fill_diagonal(between, max(float(every.max(initial=0.0)), float(between.max(initial=0.0))))
    at = [names.index(h) for h in hosts]
    guess = between[np.ix_(at, at)]
    return np.where(np.isnan(rates), guess, rates)


def dropped(before: float | None, now: Sequence[float]) -> bool:
    """Whether an edge planned with rate `before` is slow now: in all its last windows."""
    if before is None or not now:
        return False
    return max(now) < (1 - DROP) * before
