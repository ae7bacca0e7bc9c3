"""Meeting: what members of a new generation say of their rounds, and what follows from it. Pure.

====================================== =======================================================
a member that ...                      does
====================================== =======================================================
has one round less, but holds its sum  applies it: somebody saw that vote pass, so it counts
                                       (*roll forward*)
has fewer rounds, and no such sum      takes the whole outer state from one that is furthest
has all rounds                         goes on; a sum whose vote nobody saw pass is dropped,
                                       and that round reduced again from the drifts it kept,
                                       by those who are here now: the mean is over them
has fewer drifts than others           brings zeros, which do not count in the mean
====================================== =======================================================

So whoever dies, the survivors lose at most the dead one's drift, and a newcomer leaves its
first meeting with the outer state bit for bit.
"""

import struct
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ftkit.core.errors import JobStopped, ProtocolError, UsageError

_NOTE = struct.Struct("!qqqqqII")


class Note(NamedTuple):
    """What a member says of itself at a meeting."""

    applied: int
    """Rounds it has applied; -1: it has no state yet."""
    applied_in: int
    """Generation in which the last of them was reduced. Whoever applied a round of the same
    number in the same generation has the same state: they had met there, and were alike."""
    held_in: int
    """Generation of the sum it holds of the round after `applied`; -1 without one."""
    end: int
    """`applied` and the drifts it has: the number after the last round it knows of."""
    seen: int
    """The most rounds it knows anybody to have applied."""
    counted: int
    """Drifts in the mean of the last round it applied."""
    settings: int
    """A digest of what all must have alike."""

    def pack(self) -> bytes:
        return _NOTE.pack(*self)

    @classmethod
    def read(cls, data: bytes) -> "Note":
        if len(data) != _NOTE.size:
            raise ProtocolError(f"a note of {len(data)} bytes, not {_NOTE.size}")
        return cls(*_NOTE.unpack(data))


class Settled(NamedTuple):
    """What a meeting comes to."""

    best: Note
    """Of a member that is furthest: all are as it is afterwards."""
    forward: frozenset[int]
    """Ranks that apply the sum they hold."""
    sources: Mapping[int, int]
    """Ranks that take the outer state, and from which rank each."""
    end: int
    """The number after the last round for which anybody has a drift."""


def settle(notes: Sequence[Note]) -> Settled:
    """Judge the notes of all members, in rank order; pure, and alike on all of them.

    Raises:
      JobStopped: the state of a round that was seen is held by nobody.
      UsageError: members differ in settings.
    """
    if len({note.settings for note in notes}) > 1:
        raise UsageError(
            "members differ in parameters, learning rate, momentum, codec, feedback or delay: "
            f"{[hex(note.settings) for note in notes]} in rank order"
        )
    if all(note.applied < 0 for note in notes):
        # The beginning: the first parameters of rank 0 are everybody's.
        notes = [notes[0]._replace(applied=0), *notes[1:]]
    # A round that was reduced again, without a member that had applied it, counts as made
    # in the later generation; that member, back again, takes the others' state.
    best = max(notes, key=lambda n: (n.applied, n.applied_in))
    seen = max(note.seen for note in notes)
    if best.applied < seen:
        raise JobStopped(
            f"the outer state of round {seen} is lost: all who held it are gone. Begin anew, "
            "or from a checkpoint"
        )
    state = (best.applied, best.applied_in)
    holders = [r for r, n in enumerate(notes) if (n.applied, n.applied_in) == state]
    forward = frozenset(
        r for r, n in enumerate(notes) if (n.applied + 1, n.held_in) == state and n.applied >= 0
    )
    behind = [r for r in range(len(notes)) if r not in forward and r not in holders]
    return Settled(
        best=best,
        forward=forward,
        sources={rank: holders[i % len(holders)] for i, rank in enumerate(behind)},
        end=max(note.end for note in notes),
    )
