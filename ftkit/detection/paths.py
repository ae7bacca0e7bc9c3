"""Paths: from rates between pairs of places to what is slow: a NIC, a link, or a direction. Pure.

A *place* is whatever has a network interface of its own: a node, or a seat where all share one.
Read as a matrix from sender to receiver: a bad row is the sender's egress, a bad column the
receiver's ingress, both the NIC; a bad cell with its mirror image is the link between two places,
and one alone is a direction of it. What explains most cells is named first, and what it explains
is not named again.

The rule for a cell, with the thresholds that separated 11 of 11 faults injected with `tc`: its
test took longer than the scheduler's own noise, and it is under a third of the median cell or
under half of its own history. History is what tells a 3x fault in a network where no two paths
are alike, and on two nodes, where there is no median to speak of. Where every cell is less than it
was, the machines are busy, and history is scaled by the best of them: a network that is slow as a
whole cannot be told from that here. Cells that are bad, and hardly compared with the worst, are
left for the next time.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from statistics import median_high

Pair = tuple[int, int]
"""Sender and receiver."""

#: A cell is bad under this share of the median cell, or of what it was itself.
OF_MEDIAN, OF_HISTORY = 1 / 3, 1 / 2
#: A row with two bad cells or more is bad when the rest of it is under this share of the median.
OF_LINE = 1 / 2
#: A bad cell that is this many times better than the worst may be noise beside it.
OF_WORST = 8.0
#: Tests shorter than this measure the scheduler, which was seen to add 2 to 5 ms.
FLOOR_S = 0.005
#: Fewer, and one good repeat among noise is not to be expected.
REPEATS_MIN = 5
#: One that took so long needs no repeats: no scheduler adds as much.
LONG_S = 0.25


class Where(StrEnum):
    """What a fault of communication is a fault of."""

    EGRESS = "egress"
    """All that leaves a place."""
    INGRESS = "ingress"
    """All that reaches a place."""
    NIC = "nic"
    """Both."""
    LINK = "link"
    """What passes between two places, both ways."""
    DIRECTION = "direction"
    """What passes from one place to another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """What the tests of one direction between two places came to."""

    nbytes: int
    """Of one transfer."""
    seconds: float
    """The shortest of the repeats; infinite when the path carries nothing."""
    repeats: int = REPEATS_MIN

    @property
    def rate(self) -> float:
        """Bytes a second; 0 when nothing comes through."""
        return self.nbytes / self.seconds if self.seconds > 0 else float("inf")

    @property
    def dead(self) -> bool:
        return self.rate == 0.0

    @property
    def firm(self) -> bool:
        """Whether it can be compared; else it says that something comes through, and no more."""
        return self.dead or self.repeats >= REPEATS_MIN or self.seconds >= LONG_S


@dataclass(frozen=True, slots=True, kw_only=True)
class PathFault:
    """One thing that is wrong, and the cells that show it."""

    where: Where
    place: int
    """Whose: the sender of a direction, the lower end of a link."""
    peer: int | None
    """The receiver of a direction, the upper end of a link; None for what belongs to a place."""
    cells: tuple[Pair, ...]
    """In order."""
    share: float
    """The best rate among them over what it should be; 0 when they carry nothing."""
    alone: bool
    """Whether neither end was tried with anybody else: then a link may as well be a NIC."""


def bad_cells(cells: Mapping[Pair, Cell], history: Mapping[Pair, float]) -> dict[Pair, float]:
    """The cells that are bad -> their share of what they should be.

    Args:
      cells: what was measured.
      history: bytes a second that pairs reached in a healthy time; not all need be there.
    """
    firm = {pair: cell for pair, cell in cells.items() if cell.firm}
    rates = [cell.rate for cell in firm.values()]
    # The upper one of two: with half of the cells bad it is still that of a good one.
    middle = median_high(rates) if len(rates) > 1 else 0.0
    kept = {p: c.rate / history[p] for p, c in firm.items() if history.get(p)}
    best = min(1.0, max(kept.values(), default=1.0)) if len(kept) > 2 else 1.0
    found: dict[Pair, float] = {}
    for pair, cell in firm.items():
        if not cell.dead and cell.seconds <= FLOOR_S:
            continue
        shares = [(cell.rate / middle, OF_MEDIAN)] if middle > 0 else []
        if pair in kept and best > 0:
            shares.append((kept[pair] / best, OF_HISTORY))
        low = [share for share, limit in shares if share < limit]
        if cell.dead or low:
            found[pair] = 0.0 if cell.dead else min(low)
    worst = min(found.values(), default=0.0)
    return {pair: share for pair, share in found.items() if share <= OF_WORST * worst}


def read(cells: Mapping[Pair, Cell], history: Mapping[Pair, float]) -> list[PathFault]:
    """What is wrong with the paths that were tried; [] when they are healthy.

    A row or a column counts as bad when two cells of it are, or more, and all others that were
    tried are at least doubtful.
    """
    bad = bad_cells(cells, history)
    left = set(bad)
    rates = [cell.rate for cell in cells.values() if cell.firm]
    middle = median_high(rates) if rates else 0.0
    doubtful = left | {p for p, c in cells.items() if c.firm and c.rate < OF_LINE * middle}
    found: list[PathFault] = []

    def name(where: Where, place: int, peer: int | None, over: Iterable[Pair]) -> None:
        pairs = tuple(sorted(over))
        ends = {place} if peer is None else {place, peer}
        others = [p for p in cells if ends & {*p} and p not in pairs and p[::-1] not in pairs]
        found.append(
            PathFault(
                where=where,
                place=place,
                peer=peer,
                cells=pairs,
                share=max(bad[p] for p in pairs if p in bad),
                alone=peer is not None and not others,
            )
        )
        left.difference_update(pairs)

    lines: list[tuple[Where, int, set[Pair]]] = []
    places = sorted({end for pair in cells for end in pair})
    for place in places:
        row = {p for p in cells if p[0] == place}
        column = {p for p in cells if p[1] == place}
        row_bad, column_bad = (len(line & left) > 1 and line <= doubtful for line in (row, column))
        if row_bad and column_bad:
            lines.append((Where.NIC, place, row | column))
        elif row_bad:
            lines.append((Where.EGRESS, place, row))
        elif column_bad:
            lines.append((Where.INGRESS, place, column))
    for where, place, line in sorted(lines, key=lambda item: -len(item[2])):
        # A line that others explain but for one cell is that cell's own story.
        if len(line & left) > 1:
            name(where, place, None, line)
    for a, b in sorted(left):
        if (a, b) not in left:
            continue  # it went with its mirror image
        if (b, a) in left:
            name(Where.LINK, min(a, b), max(a, b), [(a, b), (b, a)])
        else:
            name(Where.DIRECTION, a, b, [(a, b)])
    return found


def further(
    cells: Mapping[Pair, Cell],
    bad: Iterable[Pair],
    places: Iterable[int],
    history: Mapping[Pair, float],
) -> list[Pair]:
    """Pairs to try next, so that a NIC can be told from a link: (lower, upper), both ways meant.

    Each end of a bad cell meets up to three places that it has not met: those first that look
    healthy, and with which it has a history.
    """
    ends = sorted({end for pair in bad for end in pair})
    places = list(places)
    pairs: set[Pair] = set()
    for end in ends:
        met = {p[0] if p[1] == end else p[1] for p in cells if end in p}
        fresh = [place for place in places if place != end and place not in met]
        fresh.sort(key=lambda place: (place in ends, (end, place) not in history, place))
        pairs |= {(min(end, other), max(end, other)) for other in fresh[:3]}
    return sorted(pairs)
