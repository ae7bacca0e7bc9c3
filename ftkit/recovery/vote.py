"""The vote that commits a step: one tiny message from every rank to every rank.

Cast just before the first optimizer changes anything. Each rank counts the same votes, so
all reach the same result, or none does: if any rank saw it pass, all had reduced and voted.
The vote also carries what would otherwise need a message of its own: the slots' losses, and
which newcomers' world each rank is ready to switch to.
"""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum, auto

from ftkit.core.errors import ProtocolError
from ftkit.core.ids import Generation, Slot, Step

_HEAD = struct.Struct("<QQQQQQI")
_LOSS = struct.Struct("<Id")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ballot:
    """What one rank says about the step it has reduced."""

    generation: Generation
    step: Step
    digest: int = 0
    """64-bit digest of the reduced gradients: the same on all ranks, or one is corrupt."""
    data_digest: int = 0
    """64-bit digest of what every rank read alike, 0 where ranks read different samples."""
    layout: int = 0
    """64-bit digest of the layout of this rank's state: the same on all ranks, which share the
    capture of it. 0 before the first snapshot."""
    prepared: Generation = Generation(0)
    """The newcomers' world this rank is linked for, 0 for none."""
    losses: Mapping[Slot, float] = field(default_factory=dict)

    def pack(self) -> bytes:
        head = _HEAD.pack(
            self.generation,
            self.step,
            self.digest,
            self.data_digest,
            self.layout,
            self.prepared,
            len(self.losses),
        )
        return head + b"".join(_LOSS.pack(s, v) for s, v in sorted(self.losses.items()))

    @classmethod
    def unpack(cls, data: bytes) -> "Ballot":
        """Read what `pack` wrote. Raises ProtocolError on anything else."""
        if len(data) < _HEAD.size:
            raise ProtocolError(f"a ballot has at least {_HEAD.size} bytes, got {len(data)}")
        generation, step, digest, data_digest, layout, prepared, count = _HEAD.unpack_from(data)
        if len(data) != _HEAD.size + count * _LOSS.size:
            raise ProtocolError(f"a ballot with {count} losses cannot have {len(data)} bytes")
        return cls(
            generation=Generation(generation),
            step=Step(step),
            digest=digest,
            data_digest=data_digest,
            layout=layout,
            prepared=Generation(prepared),
            losses={Slot(s): v for s, v in _LOSS.iter_unpack(data[_HEAD.size :])},
        )


class Refusal(StrEnum):
    """Why a vote did not pass."""

    OUT_OF_STEP = auto()
    """Ranks voted on different steps or generations."""
    STATE = auto()
    """Ranks hold state of different layouts, and could not restore each other."""
    DATA = auto()
    """Ranks read different data where all should read the same."""
    GRADIENTS = auto()
    """Ranks hold different reduced gradients: corruption."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """The result of a vote, the same on every rank that counted it."""

    refusal: Refusal | None = None
    """Why it did not pass; None when it did."""
    reason: str = ""
    """The same for people, naming the ranks that differ."""
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
    if odd := minority([b.layout for b in ballots]):
        return Tally(
            refusal=Refusal.STATE,
            reason=f"ranks {odd} hold other tensors than the rest at step {first.step}",
        )
    if odd := minority([b.data_digest for b in ballots]):
        return Tally(
            refusal=Refusal.DATA,
            reason=f"ranks {odd} read other data than the rest at step {first.step}",
        )
    if odd := minority([b.digest for b in ballots]):
        return Tally(
            refusal=Refusal.GRADIENTS,
            reason=f"ranks {odd} hold other reduced gradients than the rest at step {first.step}",
        )
    losses = {slot: value for b in ballots for slot, value in b.losses.items()}
    prepared = {b.prepared for b in ballots}
    switch = prepared.pop() if len(prepared) == 1 else Generation(0)
    total = sum(losses[s] for s in sorted(losses))
    return Tally(
        switch=switch if switch > first.generation else None,
        loss=total / len(losses) if losses else None,
        total=total if losses else None,
    )


def minority(values: Sequence[int]) -> list[int]:
    """Positions that differ from the commonest value; all of them when there is no majority."""
    commonest = max(set(values), key=lambda v: (values.count(v), -values.index(v)))
    if values.count(commonest) == len(values):
        return []
    if values.count(commonest) * 2 <= len(values):
        return list(range(len(values)))
    return [i for i, value in enumerate(values) if value != commonest]
