"""Partition: who has to go when two members lose each other again and again, with the reason.

Pure. A link that breaks once is nothing: the next generation makes it anew. One that is broken
in generation after generation keeps everybody from training, so one of its ends is evicted. Its
replacement comes in once it reaches all members, and the others train on without it.

Pairs are counted by their seats: a replacement that cannot reach the same peer is no better.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from ftkit.core.ids import Generation, MemberId, Seat, Step
from ftkit.recovery.facts import MemberFacts

Pair = tuple[Seat, Seat]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """A link that was broken when a generation ended."""

    seats: Pair
    """Its ends, the lower first."""
    times: int = 1
    """Generations in a row that ended with it broken, without enough progress between them."""
    step: Step
    """Where the job stood when it was counted last."""
    halted: Generation
    """The halt at which it was counted last: each counts once."""


def count(
    before: Sequence[Cut],
    standing: Sequence[MemberFacts],
    *,
    step: Step,
    halted: Generation,
    progress_steps: int,
) -> tuple[Cut, ...]:
    """The links that are broken now, and how often they were in a row.

    Args:
      before: what was counted at the halt before, or at this one.
      standing: the living members of the world that ended, each standing still. A link is
        broken when either end says so; one to a member that is not among these is its death.
      step: the step the job stands at.
      halted: this halt, as `Plan.halted`.
      progress_steps: steps after which a break is forgotten.
    """
    known = {cut.seats: cut for cut in before}
    seats = {f.member: f.seat for f in standing}
    # When many have died, every survivor tells of the same: those are looked through once.
    told = {cut: cut & seats.keys() for cut in {f.cut for f in standing}}
    pairs = sorted({_pair(f.seat, seats[m]) for f in standing for m in told[f.cut]})
    cuts = []
    for pair in pairs:
        cut = known.get(pair)
        if cut is None or step - cut.step >= progress_steps:
            cut = Cut(seats=pair, step=step, halted=halted)
        elif cut.halted != halted:
            cut = replace(cut, times=cut.times + 1, step=step, halted=halted)
        cuts.append(cut)
    return tuple(cuts)


def lasting(cuts: Sequence[Cut], cuts_max: int) -> Cut | None:
    """The first link that was broken in `cuts_max` generations in a row, if there is one."""
    return next((cut for cut in cuts if cut.times >= cuts_max), None)


def culprit(
    cut: Cut, standing: Sequence[MemberFacts], *, needed: Collection[MemberId]
) -> tuple[MemberFacts, str]:
    """Which end of a lasting cut to evict, and why.

    The one that more members cannot reach, for then the fault is likely on its side; else the
    younger one, which has less to lose. Not one of the `needed`, without whom no state is left.
    """
    ends = [f for f in standing if f.seat in cut.seats]
    accusers = {f.member: {o.seat for o in standing if f.member in o.cut} for f in ends}
    gone = max(ends, key=lambda f: (f.member not in needed, len(accusers[f.member]), f.member))
    other = next(f for f in ends if f is not gone)
    ours, theirs = len(accusers[gone.member]), len(accusers[other.member])
    if other.member in needed:
        why = f"seat {other.seat} alone holds the state"
    elif ours > theirs:
        why = f"{ours} members cannot reach it, and {theirs} the other end"
    else:
        why = "it is the younger of the two"
    return gone, (
        f"the link between seats {cut.seats[0]} and {cut.seats[1]} was broken in {cut.times} "
        f"generations in a row; member {gone.member} in seat {gone.seat} has to go: {why}"
    )


def _pair(one: Seat, other: Seat) -> Pair:
    return (one, other) if one < other else (other, one)
