"""RingOrder: the order of the ring, for its slowest edge first. Pure.

A pipelined ring runs at the pace of its slowest edge, so that is what is maximised; among
equals the sum of the edges' slowness decides. Members of a host stand side by side, since
an edge within a host costs the network nothing. It is exact up to `EXACT_MAX` members
(Held and Karp's recursion, run for the maximum and then for the sum), and a local search
beyond (`ring_search`), between hosts then.

All comparisons are of integers: every member that is given the same matrix finds the same
ring, whatever its processor.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ftkit.collectives.rates import Matrix
from ftkit.collectives.ring_search import Slowness, search

EXACT_MAX = 11
#: A new ring must be better than the one in use by this much to be worth the change.
HYSTERESIS = 0.1
#: Slowness of the fastest edge; the resolution of rates is a thousandth.
_UNIT = 1024
_SLOWEST = _UNIT << 20
#: Slowness of an edge that does not exist, small enough to be summed.
UNREACHABLE = _UNIT << 30


@dataclass(frozen=True, slots=True)
class Ring:
    """An order of members, each of which sends to the next, the last one to the first."""

    order: tuple[int, ...]
    slowest: float
    """Bytes a second of its slowest edge; 0 when that cannot be crossed."""
    edge: tuple[int, int]
    """The slowest edge: from, to."""


def ring_of(order: Sequence[int], rates: Matrix) -> Ring:
    """The ring of this order. `rates` has no unknown entry off its diagonal."""
    edges = edges_of(order)
    slow = min(edges, key=lambda edge: float(rates[edge]))
    return Ring(tuple(order), float(rates[slow]), slow)


def edges_of(order: Sequence[int]) -> list[tuple[int, int]]:
    """(from, to) of each edge, in order."""
    return list(zip(order, [*order[1:], order[0]], strict=True))


def natural(hosts: Sequence[str]) -> tuple[int, ...]:
    """The order before anything was measured: by rank, hosts side by side."""
    first = {host: hosts.index(host) for host in hosts}
    return tuple(sorted(range(len(hosts)), key=lambda i: (first[hosts[i]], i)))


def plan(rates: Matrix, hosts: Sequence[str], current: Sequence[int] | None = None) -> Ring:
    """The ring to use from now on.

    Args:
      rates: float64, shape (n, n), no unknown entry off its diagonal (`rates.filled`).
      hosts: each member's host.
      current: the order in use, by default the natural one.

    Returns:
      The best ring found; the current one, unless that is better than it by more than
      `HYSTERESIS` in its slowest edge, or as good there and better by as much in the sum.
    """
    order = tuple(current) if current is not None else natural(hosts)
    if len(hosts) < 3:
        return ring_of(order, rates)
    slow = slowness(rates)
    best = _exact(slow, hosts) if len(hosts) <= EXACT_MAX else _by_hosts(slow, hosts)
    old_worst, old_sum = cost(order, slow)
    new_worst, new_sum = cost(best, slow)
    better = new_worst * (1 + HYSTERESIS) < old_worst
    leaner = new_worst <= old_worst and new_sum * (1 + HYSTERESIS) < old_sum
    return ring_of(best if better or leaner else order, rates)


def slowness(rates: Matrix) -> Slowness:
    """Integers in proportion to the time a byte takes: the fastest edge has 1024."""
    off = ~np.eye(len(rates), dtype=bool)
    top = float(rates[off].max(initial=0.0)) or 1.0
    with np.errstate(divide="ignore", over="ignore"):
        times = np.minimum(np.rint(top / np.where(off, rates, 1.0) * _UNIT), _SLOWEST)
    return np.where((rates <= 0) & off, UNREACHABLE, times).astype(np.int64)


def cost(order: Sequence[int], slow: Slowness) -> tuple[int, int]:
    """What is minimised: the slowness of the slowest edge, then that of all together."""
    each = [int(slow[edge]) for edge in edges_of(order)]
    return max(each), sum(each)


def _exact(slow: Slowness, hosts: Sequence[str]) -> tuple[int, ...]:
    """The best of all rings with hosts side by side."""
    sizes = {host: hosts.count(host) for host in hosts}
    smallest = min(sizes, key=lambda host: (sizes[host], hosts.index(host)))
    # A ring may be cut between two hosts: it begins where one enters the smallest host. With
    # one host only there is no such place, and any member will do.
    starts = [i for i, host in enumerate(hosts) if host == smallest]
    if len(sizes) == 1:
        starts = starts[:1]
    limit = min(_tour(slow, hosts, start, np.maximum)[0] for start in starts)
    allowed = np.where(slow <= limit, slow, UNREACHABLE * len(hosts))
    return min(_tour(allowed, hosts, start, np.add) for start in starts)[1]


def _tour(
    slow: Slowness, hosts: Sequence[str], start: int, join: np.ufunc
) -> tuple[int, tuple[int, ...]]:
    """The cheapest ring that enters `start` from another host, and its cost.

    A path's cost is `join` of its edges' (maximum or sum). `best[seen, last]` is that of the
    cheapest path from `start` over the set `seen` that ends at `last`.
    """
    n, never = len(slow), np.iinfo(np.int64).max // 4
    bits = 1 << np.arange(n)
    same = np.array([[a == b for b in hosts] for a in hosts])
    whole = same @ bits
    best = np.full((1 << n, n), never, dtype=np.int64)
    before = np.full((1 << n, n), -1, dtype=np.int8)
    best[bits[start], start] = 0
    for seen in range(1 << n):
        if not seen >> start & 1:
            continue
        free = np.flatnonzero((seen & bits) == 0)
        if not free.size:
            continue
        # A host is left when all of it was seen, and so never entered twice.
        left = (seen & whole) == whole
        steps = np.where(left[:, None] != same, join(best[seen][:, None], slow), never)[:, free]
        best[seen | bits[free], free] = steps.min(axis=0)
        before[seen | bits[free], free] = steps.argmin(axis=0)
    seen = (1 << n) - 1
    closing = join(best[seen], slow[:, start])
    if not same.all():
        closing = np.where(same[:, start], never, closing)
    last = int(closing.argmin())
    total, order = int(closing[last]), [last]
    while order[-1] != start:
        node = order[-1]
        order.append(int(before[seen, node]))
        seen ^= int(bits[node])
    return total, tuple(reversed(order))


def _by_hosts(slow: Slowness, hosts: Sequence[str]) -> tuple[int, ...]:
    """Order the hosts, then choose where each is entered and left; inside, order of rank."""
    names = list(dict.fromkeys(hosts))
    members = [[i for i, h in enumerate(hosts) if h == name] for name in names]
    if len(names) == 1:
        return tuple(range(len(hosts)))
    between = np.array([[slow[np.ix_(a, b)].min() for b in members] for a in members])
    if len(names) <= EXACT_MAX:
        order = _exact(between, names) if len(names) > 2 else (0, 1)
    else:
        order = search(between)
    entry: dict[int, int] = {}
    leave: dict[int, int] = {}
    for a, b in sorted(edges_of(order), key=lambda edge: -int(between[edge])):
        # The slowest crossings choose their members first.
        exits = [i for i in members[a] if len(members[a]) == 1 or entry.get(a) != i]
        entries = [i for i in members[b] if len(members[b]) == 1 or leave.get(b) != i]
        _, leave[a], entry[b] = min((int(slow[i, j]), i, j) for i in exits for j in entries)
    ring: list[int] = []
    for host in order:
        inner = [i for i in members[host] if i not in (entry[host], leave[host])]
        ends = [leave[host]] if leave[host] != entry[host] else []
        ring += [entry[host], *inner, *ends]
    return tuple(ring)
