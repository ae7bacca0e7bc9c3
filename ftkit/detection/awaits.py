"""Awaits: in a collective that nobody leaves, between whom the bytes are missing. Pure.

Each data plane notes whose bytes its pending collective waits for. Most wait only because others
do: a ring passes on what has come. The one edge that explains the rest is that from a member who
waits for nobody, and so has sent all that is his, to one who waits for him. A test of that path
can then confirm it (`inquiry`).
"""

from collections.abc import Iterable, Mapping

from ftkit.core.ids import MemberId, Seat
from ftkit.detection.track import Track


def awaited(members: Iterable[Track]) -> dict[Seat, tuple[Seat, ...]]:
    """Who waits for whose bytes, by seats; members whose data plane told nothing are left out.

    Only what was told of the collective that is pending now counts.
    """
    known = list(members)
    seats: Mapping[MemberId, Seat] = {one.member: one.seat for one in known}
    found: dict[Seat, tuple[Seat, ...]] = {}
    for one in known:
        told = one.awaited
        if told is not None and (told.group, told.seq) == one.pending:
            found[one.seat] = tuple(sorted(seats[m] for m in told.members if m in seats))
    return found


def roots(waits: Mapping[Seat, Iterable[Seat]]) -> list[tuple[Seat, Seat]]:
    """The paths, as (sender, receiver), whose silence explains the others. May be none."""
    return sorted(
        (sender, receiver)
        for receiver, senders in waits.items()
        for sender in senders
        if sender in waits and not tuple(waits[sender])
    )
