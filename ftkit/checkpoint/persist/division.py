"""Division: which node writes which boxes of a snapshot, from the copies alone (pure).

Parts cut tensors at chunk bounds, files do not: a box is written by the node whose part holds
its first byte, which reads the rest from the nodes that have it. Everybody who is told the
same copies comes to the same division, so nothing about it need be agreed on.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ftkit.checkpoint.layout import Entry, StateLayout
from ftkit.core.errors import IntegrityError
from ftkit.core.ids import NodeId
from ftkit.core.inventory import Copy


class Extent(NamedTuple):
    """Bytes `first` to `end` of a layout's data, and the part they are read from."""

    copy: Copy
    first: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Writing:
    """One box for one node to write."""

    entry: Entry
    extents: tuple[Extent, ...]
    """Where its bytes are, in order; of a box without elements none."""


def extents(copies: Iterable[Copy]) -> dict[str, tuple[Extent, ...]]:
    """For each layout, what to read from where so that every byte is read once, in order.

    Parts of newer generations go first, then those of lower nodes and seats.

    Raises:
      IntegrityError: the copies do not cover a layout.
    """
    by_layout: dict[str, list[Copy]] = {}
    for copy in copies:
        by_layout.setdefault(copy.part.layout, []).append(copy)
    found = dict[str, tuple[Extent, ...]]()
    for layout, own in sorted(by_layout.items()):
        total, at, runs = own[0].part.total, 0, list[Extent]()
        own.sort(key=lambda c: (-c.generation, c.node, c.seat))
        while at < total:
            best = next((c for c in own if c.part.first <= at < c.part.end), None)
            if best is None:
                raise IntegrityError(
                    f"byte {at} of {total} of layout {layout} is in none of {len(own)} parts"
                )
            better = own[: own.index(best)]
            end = min([best.part.end, *(c.part.first for c in better if c.part.first > at)])
            runs.append(Extent(best, at, end))
            at = end
        found[layout] = tuple(runs) or (Extent(own[0], 0, 0),)
    return found


def writers(copies: Sequence[Copy]) -> frozenset[NodeId]:
    """The nodes that read some of a snapshot from their own memory, and so may have to write."""
    return frozenset(e.copy.node for runs in extents(copies).values() for e in runs)


def divide(
    copies: Sequence[Copy], layouts: Mapping[str, StateLayout]
) -> dict[NodeId, tuple[Writing, ...]]:
    """What each node writes. A box that several layouts have is written once.

    Args:
      copies: of one step; together they cover their layouts.
      layouts: each of them, by its digest.

    Raises:
      IntegrityError: the copies do not cover a layout.
    """
    found: dict[NodeId, list[Writing]] = {}
    taken = set[tuple[str, tuple[int, ...], tuple[int, ...]]]()
    for digest, runs in extents(copies).items():
        for entry in layouts[digest].entries:
            key = entry.name, entry.offsets, entry.shape
            if key in taken:
                continue
            taken.add(key)
            end = entry.at + entry.bytes
            cut = tuple(
                Extent(r.copy, max(r.first, entry.at), min(r.end, end))
                for r in runs
                if r.first < end and entry.at < r.end and entry.bytes
            )
            node = cut[0].copy.node if cut else runs[0].copy.node
            found.setdefault(node, []).append(Writing(entry=entry, extents=cut))
    return {node: tuple(writings) for node, writings in found.items()}
