"""Ring search: a good ring over many members, where trying all is out of reach. Pure.

The slowest edge is bounded by bisection: an edge above the bound counts as forbidden, and
local search (2-opt, which turns a piece round, and or-opt, which moves a short piece
elsewhere) tries to come to a ring without any. The matrix may be asymmetric: turning a piece
round pays for its edges in the other direction. Integers throughout, the best move first, so
that the result is the same everywhere.
"""

import numpy as np
from numpy.typing import NDArray

Slowness = NDArray[np.int64]

_PIECE_MAX = 3
_NEVER = np.iinfo(np.int64).max // 4


def search(slow: Slowness) -> tuple[int, ...]:
    """An order of all members: the slowest edge small first, then the sum.

    Args:
      slow: int64, shape (n, n), n at least 3; the diagonal is not looked at.
    """
    n = len(slow)
    order = improve(_greedy(slow), slow)
    worst = int(_edges(order, slow).max())
    off = slow[~np.eye(n, dtype=bool)].reshape(n, n - 1)
    columns = slow.T[~np.eye(n, dtype=bool)].reshape(n, n - 1)
    # No ring can do without entering and leaving each member.
    floor = int(max(off.min(axis=1).max(), columns.min(axis=1).max()))
    levels = np.unique(off[(off >= floor) & (off <= worst)])
    low, high = 0, len(levels) - 1
    while low < high:
        middle = (low + high) // 2
        bound = int(levels[middle])
        found = improve(order, _forbidding(slow, bound))
        if int(_edges(found, slow).max()) <= bound:
            order, high = found, int(np.searchsorted(levels, _edges(found, slow).max()))
        else:
            low = middle + 1
    final = improve(order, _forbidding(slow, int(_edges(order, slow).max())))
    return tuple(int(i) for i in final)


def improve(order: NDArray[np.int64], slow: Slowness) -> NDArray[np.int64]:
    """Apply the best move until none lowers the sum of the edges' slowness."""
    while True:
        moves = [_best_turn(order, slow)]
        moves += [_best_shift(order, slow, size) for size in range(1, _PIECE_MAX + 1)]
        gain, better = min(moves, key=lambda move: move[0])
        if gain >= 0:
            return order
        order = better


def _greedy(slow: Slowness) -> NDArray[np.int64]:
    """From member 0 always on to the nearest one left."""
    left = np.ones(len(slow), dtype=bool)
    order = [0]
    left[0] = False
    while left.any():
        order.append(int(np.where(left, slow[order[-1]], _NEVER).argmin()))
        left[order[-1]] = False
    return np.array(order, dtype=np.int64)


def _forbidding(slow: Slowness, bound: int) -> Slowness:
    """The same matrix with a price on edges above `bound` that no sum of others reaches."""
    allowed = slow <= bound
    return np.where(allowed, slow, bound * len(slow) + 1)


def _edges(order: NDArray[np.int64], slow: Slowness) -> NDArray[np.int64]:
    return slow[order, np.roll(order, -1)]


def _best_turn(order: NDArray[np.int64], slow: Slowness) -> tuple[int, NDArray[np.int64]]:
    """2-opt: reverse order[i..j], 0 < i < j < n."""
    n = len(order)
    after = np.roll(order, -1)
    forth = np.concatenate([[0], np.cumsum(slow[order, after])])
    back = np.concatenate([[0], np.cumsum(slow[after, order])])
    i, j = np.arange(1, n - 1)[:, None], np.arange(n)[None, :]
    before_i, at_i, at_j, after_j = order[i - 1], order[i], order[j], after[j]
    gain = (
        slow[before_i, at_j]
        + slow[at_i, after_j]
        + (back[j] - back[i])
        - (forth[j] - forth[i])
        - slow[before_i, at_i]
        - slow[at_j, after_j]
    )
    gain = np.where(j > i, gain, _NEVER)
    at = int(gain.argmin())
    first, last = at // n + 1, at % n
    best = int(gain.flat[at])
    if best >= 0:
        return 0, order
    turned = order.copy()
    turned[first : last + 1] = order[first : last + 1][::-1]
    return best, turned


def _best_shift(
    order: NDArray[np.int64], slow: Slowness, size: int
) -> tuple[int, NDArray[np.int64]]:
    """Or-opt: move a piece of `size` to stand between two others, as it is."""
    n = len(order)
    if n < size + 2:
        return 0, order
    start = np.arange(n)
    head, tail = order, np.roll(order, 1 - size)
    before, after = np.roll(order, 1), np.roll(order, -size)
    freed = slow[before, after] - slow[before, head] - slow[tail, after]
    left, right = order, np.roll(order, -1)
    gain = (
        freed[:, None]
        + slow[left[None, :], head[:, None]]
        + slow[tail[:, None], right[None, :]]
        - slow[left, right][None, :]
    )
    # The gap must lie outside the piece and not be the one before it.
    distance = (start[None, :] - start[:, None]) % n
    gain = np.where((distance >= size) & (distance < n - 1), gain, _NEVER)
    at = int(gain.argmin())
    piece, gap = at // n, at % n
    best = int(gain.flat[at])
    if best >= 0:
        return 0, order
    turned = np.roll(order, -piece)
    cut = (gap - piece) % n + 1
    return best, np.concatenate([turned[size:cut], turned[:size], turned[cut:]])
