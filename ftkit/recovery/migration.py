"""Migration: layers that travel to their next owners while training goes on, and when to switch. Pure.

::

    vote s: a cut is proposed       snapshot of s     gradients of s+1, s+2, ...        vote t: all READY
    --|--------------------------------|==============|--|--|--|--|--|--|--|-------------|--[switch]-->
      all ranks alike                   background      each after its step                after step t

Each rank says on its ballot which migration it takes part in, and how it stands. All count the same
ballots, so all switch after the same step, or drop it at the same step, and training is none the
worse. A ballot lost in a fault ends the world, and the migration with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, StrEnum, auto

#: Votes after which a migration that is not READY everywhere is dropped.
VOTES_MAX = 200


class Stand(IntEnum):
    """How a rank stands, as its ballot says."""

    NONE = 0
    MOVING = 1
    READY = 2
    """All that has been sent for it is here, but for the gradients of the step voted on."""
    FAILED = 3


class Ruling(StrEnum):
    """What follows from a vote."""

    GO_ON = auto()
    SWITCH = auto()
    """After this step."""
    DROP = auto()


@dataclass(frozen=True, slots=True)
class Said:
    """What one ballot says of it."""

    move: int
    """`Proposal.id`; 0 for none."""
    stand: int
    joining: bool
    """Whether the rank is ready for a world with newcomers."""


def ruling(move: int, said: Sequence[Said], *, votes: int) -> tuple[Ruling, str]:
    """What becomes of migration `move`, and why.

    Args:
      move: the one this rank takes part in.
      said: by all ranks, in order.
      votes: that have passed since it began, this one among them.
    """
    if any(s.joining for s in said):
        return Ruling.DROP, "the world is about to grow"
    apart = [rank for rank, s in enumerate(said) if s.move != move]
    if apart:
        return Ruling.DROP, f"ranks {apart} know of another migration, or of none"
    failed = [rank for rank, s in enumerate(said) if s.stand == Stand.FAILED]
    if failed:
        return Ruling.DROP, f"ranks {failed} gave it up"
    if all(s.stand == Stand.READY for s in said):
        return Ruling.SWITCH, "every layer is where it goes"
    if votes >= VOTES_MAX:
        late = [rank for rank, s in enumerate(said) if s.stand != Stand.READY]
        return Ruling.DROP, f"ranks {late} are not ready after {votes} steps"
    return Ruling.GO_ON, ""
