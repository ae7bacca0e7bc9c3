"""Lateness: who came last to a collective, and how long it took once all were there. No clocks.

Each member says how long it was in it, on its own clock. In a collective that nobody leaves before
all have come, all leave together, so::

    lateness of r = max over s of (duration of s) - (duration of r)
    transfer      = min over s of (duration of s)

The last to come was in it for the transfer alone, and the others waited for that one. It is to blame
where its own work before the collective accounts for that; where it does not, it came late because
another group kept it (a receive from the stage before, say): it is a victim, and nobody is blamed
here, for the collective of that other group tells who was.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from ftkit.core.ids import Generation, Seat
from ftkit.detection.cusum import median
from ftkit.detection.signals import CommSeen

#: So many collectives of a group, and a member that has told of none is not waited for any more.
_PATIENCE: Final = 256
#: Of what the others waited, what the work of the last one must exceed theirs by.
_OWN_SHARE: Final = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """One collective, as all that were heard of tell of it."""

    generation: Generation
    group: int
    seq: int
    nbytes: int
    """What a rank brings to it, the most of them."""
    transfer_s: float
    late_s: Mapping[Seat, float]
    """By how much each came later than the first, for which it is 0."""
    last: Seat
    by_itself: bool
    """Whether the last one was late for its own work, and no victim."""

    @property
    def waited_s(self) -> dict[Seat, float]:
        """How long each waited for the last one."""
        latest = self.late_s[self.last]
        return {seat: latest - late for seat, late in self.late_s.items() if seat != self.last}


def join(
    generation: Generation,
    group: int,
    seq: int,
    told: Mapping[Seat, tuple[float, float]],
    *,
    nbytes: int = 0,
) -> Joined:
    """One collective from (duration, work before it) of each of its members; two at least."""
    longest = max(spent for spent, _ in told.values())
    last = min(told, key=lambda seat: (told[seat][0], seat))
    transfer = told[last][0]
    others = median([worked for seat, (_, worked) in told.items() if seat != last])
    return Joined(
        generation=generation,
        group=group,
        seq=seq,
        nbytes=nbytes,
        transfer_s=transfer,
        late_s={seat: longest - spent for seat, (spent, _) in told.items()},
        last=last,
        by_itself=told[last][1] - others >= _OWN_SHARE * (longest - transfer),
    )


class Lateness:
    """Joins what the agents tell. Owned by one thread."""

    def __init__(self) -> None:
        self._generation = Generation(0)
        self._open: dict[int, dict[int, dict[Seat, tuple[float, float]]]] = {}
        #: By group and collective: the most bytes that a member brings.
        self._nbytes: dict[tuple[int, int], int] = {}
        #: Of each group: the last collective that each of its members has told of.
        self._told: dict[int, dict[Seat, int]] = {}
        self._done: dict[int, int] = {}

    def ingest(self, seen: CommSeen) -> list[Joined]:
        """Take in what one rank tells; returns the collectives that are whole now."""
        if seen.generation < self._generation or not seen.seqs:
            return []
        if seen.generation > self._generation:
            self._generation = seen.generation
            self._open, self._told, self._done, self._nbytes = {}, {}, {}, {}
        group = self._open.setdefault(seen.group, {})
        told = self._told.setdefault(seen.group, {})
        done = self._done.get(seen.group, -1)
        for seq, spent, worked, nbytes in zip(
            seen.seqs, seen.spent_s, seen.worked_s, seen.nbytes, strict=True
        ):
            if seq > done:
                group.setdefault(seq, {})[seen.seat] = (spent, worked)
                which = seen.group, seq
                self._nbytes[which] = max(self._nbytes.get(which, 0), nbytes)
        told[seen.seat] = max(seen.seqs)
        if len(group) > _PATIENCE:
            # Whoever has told of none of these says nothing any more.
            first = min(group)
            self._told[seen.group] = told = {s: last for s, last in told.items() if last >= first}
        # A rank's come in order, so what it has not told by now was lost, or was none of its.
        until = min(told.values()) if len(told) > 1 else -1
        joined: list[Joined] = []
        for seq in sorted(s for s in group if s <= until):
            nbytes = self._nbytes.pop((seen.group, seq))
            if len(group[seq]) > 1:
                joined.append(join(seen.generation, seen.group, seq, group[seq], nbytes=nbytes))
            del group[seq]
            self._done[seen.group] = seq
        return joined
