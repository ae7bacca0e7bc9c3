"""The vote that commits a step: one tiny message from every rank to every rank.

Cast just before the first optimizer changes anything. Each rank counts the same votes, so
all reach the same result, or none does: if any rank saw it pass, all had reduced and voted.
The vote also carries what would otherwise need a message of its own: the slots' losses, which
newcomers' world each rank is ready to switch to, how layers on their way stand, the norm of what
each rank adds to the sum of gradients, and now and then a digest of the state that all should hold
alike.

Numbers that look wrong cost one more attempt: the step is played again, once. What comes out of
the same samples a second time is in the data or the model; what does not, was corruption.
"""

import math
import statistics
import struct
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum, auto
from itertools import chain

from ftkit.core.errors import ProtocolError
from ftkit.core.ids import Generation, Slot, Step

_HEAD = struct.Struct("<QQQQQQQQdi?QBII")
_LOSS = struct.Struct("<Id")

#: A rank whose gradients are so many times those of the others is asked for them again. Ranks
#: differ by their samples, threefold and not a hundredfold; a flipped bit of an exponent makes
#: a value 65,536 times as large, or 2**32 times.
OUTLIER = 100.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ballot:
    """What one rank says about the step it has reduced."""

    generation: Generation
    step: Step
    digest: int = 0
    """64-bit digest of the reduced gradients: the same on ranks of one layout, or one is corrupt."""
    data_digest: int = 0
    """64-bit digest of what every rank read alike, 0 where ranks read different samples."""
    shape: int = 0
    """64-bit digest of what the job's state consists of, names and shapes: the same on all ranks.
    0 before the first snapshot."""
    layout: int = 0
    """64-bit digest of the layout of this rank's part of it. Ranks of the same layout hold the
    same tensors."""
    prepared: Generation = Generation(0)
    """The newcomers' world this rank is linked for, 0 for none."""
    state: int = 0
    """64-bit digest of the state held before this step; 0 in steps in which it is not looked at."""
    norm: float = 0.0
    """Of the gradients that this rank adds, a slot; not finite when they are not."""
    bad_bucket: int = -1
    """The first bucket of this rank whose gradients are not finite; -1 for none."""
    again: bool = False
    """Whether this rank's numbers have been looked at twice, now or at the step before."""
    move: int = 0
    """The migration of layers that this rank takes part in; 0 for none."""
    stand: int = 0
    """And how it stands there: `migration.Stand`."""
    losses: Mapping[Slot, float] = field(default_factory=dict)
    costs: Mapping[int, float] = field(default_factory=dict)
    """Seconds that this rank measured: in a pipeline by layer, else of a slot, as number 0."""

    def pack(self) -> bytes:
        head = _HEAD.pack(
            self.generation,
            self.step,
            self.digest,
            self.data_digest,
            self.shape,
            self.layout,
            self.prepared,
            self.state,
            self.norm,
            self.bad_bucket,
            self.again,
            self.move,
            self.stand,
            len(self.losses),
            len(self.costs),
        )
        pairs = [*sorted(self.losses.items()), *sorted(self.costs.items())]
        return head + b"".join(_LOSS.pack(s, v) for s, v in pairs)

    @classmethod
    def unpack(cls, data: bytes) -> "Ballot":
        """Read what `pack` wrote. Raises ProtocolError on anything else."""
        if len(data) < _HEAD.size:
            raise ProtocolError(f"a ballot has at least {_HEAD.size} bytes, got {len(data)}")
        *head, count, measured = _HEAD.unpack_from(data)
        if len(data) != _HEAD.size + (count + measured) * _LOSS.size:
            raise ProtocolError(
                f"a ballot with {count} losses and {measured} costs cannot have {len(data)} bytes"
            )
        pairs = list(_LOSS.iter_unpack(data[_HEAD.size :]))
        generation, step, digest, data_digest, shape, layout, prepared, *rest = head
        state, norm, bad, again, move, stand = rest
        return cls(
            generation=Generation(generation),
            step=Step(step),
            digest=digest,
            data_digest=data_digest,
            shape=shape,
            layout=layout,
            prepared=Generation(prepared),
            state=state,
            norm=norm,
            bad_bucket=bad,
            again=again,
            move=move,
            stand=stand,
            losses={Slot(s): v for s, v in pairs[:count]},
            costs=dict(pairs[count:]),
        )


class Refusal(StrEnum):
    """Why a vote did not pass."""

    OUT_OF_STEP = auto()
    """Ranks voted on different steps or generations."""
    STATE = auto()
    """Ranks hold different state, and could not restore each other."""
    DATA = auto()
    """Ranks read different data where all should read the same."""
    REPLICAS = auto()
    """Ranks hold different bits of what all should hold alike: corruption."""
    GRADIENTS = auto()
    """Ranks of one layout hold different reduced gradients: corruption."""
    NUMBERS = auto()
    """What a rank adds is not finite, or far from what the others add; said once a step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """The result of a vote, the same on every rank that counted it."""

    refusal: Refusal | None = None
    """Why it did not pass; None when it did."""
    reason: str = ""
    """The same for people, naming the ranks that differ."""
    odd: tuple[int, ...] = ()
    """The ranks it speaks of; all of them where there is no majority."""
    doubtful: tuple[int, ...] = ()
    """Ranks whose numbers look wrong, whether or not the vote passed."""
    norms: tuple[float, ...] = ()
    """Of what each rank adds, a slot."""
    bad_buckets: tuple[int, ...] = ()
    """Of each rank, as on its ballot."""
    again: bool = False
    """Whether no further look at the numbers is asked for."""
    switch: Generation | None = None
    """The newcomers' generation that all members enter after this step."""
    loss: float | None = None
    """Mean over the slots, summed in the order of slots; None when nobody recorded any."""
    total: float | None = None
    """That sum."""

    @property
    def passed(self) -> bool:
        return self.refusal is None


def tally(ballots: Sequence[Ballot]) -> Tally:
    """Count the ballots of one world, in the order of ranks."""
    first = ballots[0]
    if any((b.generation, b.step) != (first.generation, first.step) for b in ballots):
        seen = [(b.generation, b.step) for b in ballots]
        return Tally(
            refusal=Refusal.OUT_OF_STEP,
            reason=f"ranks vote on different (generation, step): {seen}",
        )
    numbers = Tally(
        doubtful=tuple(doubtful([b.norm for b in ballots])),
        norms=tuple(b.norm for b in ballots),
        bad_buckets=tuple(b.bad_bucket for b in ballots),
        again=any(b.again for b in ballots),
    )
    told = [rank for rank, b in enumerate(ballots) if b.state]
    for refusal, odd, what in (
        (Refusal.STATE, minority([b.shape for b in ballots]), "hold other tensors"),
        (Refusal.DATA, minority([b.data_digest for b in ballots]), "read other data"),
        (
            Refusal.REPLICAS,
            [told[i] for i in minority([ballots[rank].state for rank in told])],
            "hold other bits of the same state",
        ),
        (
            Refusal.GRADIENTS,
            sorted(chain.from_iterable(_apart(ballots))),
            "hold other reduced gradients",
        ),
    ):
        if odd:
            return replace(
                numbers,
                refusal=refusal,
                odd=tuple(odd),
                reason=f"ranks {odd} {what} than the rest at step {first.step}",
            )
    if numbers.doubtful and not numbers.again:
        return replace(
            numbers,
            refusal=Refusal.NUMBERS,
            odd=numbers.doubtful,
            reason=f"ranks {list(numbers.doubtful)} add gradients of norm "
            f"{', '.join(f'{numbers.norms[r]:.3g}' for r in numbers.doubtful)} at step "
            f"{first.step}, where the others add {_usual(numbers):.3g}: played again",
        )
    losses = {slot: value for b in ballots for slot, value in b.losses.items()}
    prepared = {b.prepared for b in ballots}
    switch = prepared.pop() if len(prepared) == 1 else Generation(0)
    total = sum(losses[s] for s in sorted(losses))
    return replace(
        numbers,
        switch=switch if switch > first.generation else None,
        loss=total / len(losses) if losses else None,
        total=total if losses else None,
    )


def _apart(ballots: Sequence[Ballot]) -> Iterator[list[int]]:
    """Ranks whose gradients are not those of most that have their layout."""
    by_layout = defaultdict[int, list[int]](list)
    for rank, b in enumerate(ballots):
        by_layout[b.layout].append(rank)
    for ranks in by_layout.values():
        yield [ranks[i] for i in minority([ballots[rank].digest for rank in ranks])]


def doubtful(norms: Sequence[float]) -> list[int]:
    """Ranks whose gradients are not finite, or `OUTLIER` times those of the others."""
    bad = [rank for rank, norm in enumerate(norms) if not math.isfinite(norm)]
    sound = sorted((norm, rank) for rank, norm in enumerate(norms) if math.isfinite(norm))
    for place, (norm, rank) in enumerate(sound):
        if len(sound) > 1 and norm > OUTLIER * _median_without(sound, place) > 0:
            bad.append(rank)
    return sorted(bad)


def _median_without(ordered: Sequence[tuple[float, int]], place: int) -> float:
    """The median of the values of all but one of at least two, which are in order."""
    left = len(ordered) - 1
    low, high = (left - 1) // 2, left // 2
    return (ordered[low + (low >= place)][0] + ordered[high + (high >= place)][0]) / 2


def _usual(numbers: Tally) -> float:
    sound = [n for r, n in enumerate(numbers.norms) if r not in numbers.doubtful]
    return statistics.median(sound) if sound else math.nan


def minority(values: Sequence[int]) -> list[int]:
    """Positions that differ from the commonest value; all of them when there is no majority."""
    if not values:
        return []
    # Of equally common values the first that occurs.
    commonest, times = Counter(values).most_common(1)[0]
    if times == len(values):
        return []
    if times * 2 <= len(values):
        return list(range(len(values)))
    return [i for i, value in enumerate(values) if value != commonest]
