"""State vote: whose tensors are right, when ranks that should hold the same do not. Pure.

Every rank states a hash for each tensor; what most of them hold is elected, tensor by tensor.
Who has a vote:

* a rank that may only receive (a newcomer) has none;
* where some may only send, they alone have one: what they hold is to become everybody's;
* the state offered must be the one that follows the last the ranks agreed on: its revision is
  one higher. A rank with another is told so, has no vote, and receives. (Where nobody has gone
  on since, the last one may be offered again: an agreement that was cut in half is repeated.)

All ranks compute the same from the same statements, so nothing more needs to be agreed. After
PCCL's shared state (arXiv 2505.14065), which votes likewise; here a tie is refused unless a
tie-break was asked for, because the wrong half of two would overwrite the right one.
"""

import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np

from ftkit.core.errors import ProtocolError


class Strategy(StrEnum):
    """What a rank lets happen to its state."""

    POPULAR = "popular"
    """It votes, sends what was elected, and receives what it lacks."""
    RECEIVE_ONLY = "receive-only"
    """It does not vote and does not send: a newcomer."""
    SEND_ONLY = "send-only"
    """Its state is never overwritten, and no rank that is not so, too, has a vote."""


class Tie(StrEnum):
    """What is done when two versions of a tensor have equally many votes, and none has more."""

    REFUSE = "refuse"
    """Nothing is changed."""
    LOWEST_RANK = "lowest-rank"
    """The version that the lowest rank with a vote holds, of those that tie."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Statement:
    """What one rank says of its state."""

    strategy: Strategy
    revision: int
    """Of the state it holds, at least 0."""
    previous: int | None
    """The revision that it knows all ranks to have agreed on last; None: of none."""
    layout: int
    """64 bits over names, dtypes and shapes."""
    hashes: tuple[int, ...]
    """64 bits a tensor, in the order of the layout."""

    def pack(self) -> bytes:
        """`parse` reads it."""
        head = _HEAD.pack(
            _STRATEGIES.index(self.strategy),
            self.revision,
            -1 if self.previous is None else self.previous,
            self.layout,
        )
        return head + np.array(self.hashes, dtype=">u8").tobytes()

    @classmethod
    def parse(cls, data: bytes) -> "Statement":
        """Read what `pack` wrote. Raises ProtocolError on anything else."""
        if len(data) < _HEAD.size or (len(data) - _HEAD.size) % 8:
            raise ProtocolError(f"a statement of state has not {len(data)} bytes")
        strategy, revision, previous, layout = _HEAD.unpack_from(data)
        if strategy >= len(_STRATEGIES) or revision < 0 or previous < -1:
            raise ProtocolError(f"not a statement of state: {data[: _HEAD.size].hex()}")
        hashes = np.frombuffer(data, dtype=">u8", offset=_HEAD.size)
        return cls(
            strategy=_STRATEGIES[strategy],
            revision=revision,
            previous=None if previous < 0 else previous,
            layout=layout,
            hashes=tuple(int(h) for h in hashes),
        )


_HEAD = struct.Struct("!BqqQ")
_STRATEGIES = tuple(Strategy)


@dataclass(frozen=True, slots=True, kw_only=True)
class Election:
    """What follows from all statements. Ranks and tensors are numbers."""

    revision: int
    """Of the elected state; of no use when refused."""
    elected: tuple[int, ...] = ()
    """The elected hash of each tensor; empty when the vote was refused before it was counted."""
    holders: tuple[tuple[int, ...], ...] = ()
    """By tensor: the ranks that hold what was elected and may send it."""
    differing: tuple[tuple[int, ...], ...] = ()
    """By rank: the tensors it holds in another version than the elected one."""
    told: dict[int, str] = field(default_factory=dict)
    """Ranks whose state was not counted because of its revision, and why."""
    refusal: str = ""
    """Why nothing may be changed; empty when it may."""
    undecided: tuple[int, ...] = ()
    """Tensors whose vote ended in a tie."""

    @property
    def clean(self) -> bool:
        """Whether all ranks hold the same already."""
        return not self.refusal and not any(self.differing)


def elect(
    statements: Sequence[Statement], *, names: Sequence[str] = (), tie: Tie = Tie.REFUSE
) -> Election:
    """Count the votes.

    Args:
      statements: of all ranks, in rank order; at least one.
      names: of the tensors, for what is said of them.
      tie: what to do where the votes are even.
    """
    revision, voters, told, refusal = _electorate(statements)
    refusal = refusal or _unlike(statements, voters)
    if refusal:
        return Election(revision=revision, told=told, refusal=refusal)
    elected, undecided = list[int](), list[int]()
    for tensor in range(len(statements[0].hashes)):
        votes = Counter(statements[rank].hashes[tensor] for rank in voters)
        most = max(votes.values())
        # A Counter remembers the order of first sight, which is that of the ranks.
        first, *others = [version for version, count in votes.items() if count == most]
        elected.append(first)
        if others:
            undecided.append(tensor)
    differing = tuple(
        tuple(t for t, h in enumerate(s.hashes) if h != elected[t]) for s in statements
    )
    holders = tuple(
        tuple(
            rank
            for rank, s in enumerate(statements)
            if s.hashes[tensor] == version and s.strategy is not Strategy.RECEIVE_ONLY
        )
        for tensor, version in enumerate(elected)
    )
    if undecided and tie is Tie.REFUSE:
        refusal = _tied(statements, voters, undecided, names)
    elif fixed := [
        rank
        for rank in voters
        if statements[rank].strategy is Strategy.SEND_ONLY and differing[rank]
    ]:
        refusal = f"ranks {fixed} may only send, but do not hold what was elected"
    return Election(
        revision=revision,
        elected=tuple(elected),
        holders=holders,
        differing=differing,
        told=told,
        refusal=refusal,
        undecided=tuple(undecided),
    )


def _electorate(statements: Sequence[Statement]) -> tuple[int, list[int], dict[int, str], str]:
    """(revision, ranks with a vote, who has none and why, refusal)."""
    may = [r for r, s in enumerate(statements) if s.strategy is Strategy.SEND_ONLY] or [
        r for r, s in enumerate(statements) if s.strategy is Strategy.POPULAR
    ]
    if not may:
        return 0, [], {}, "all ranks may only receive: nobody has the state"
    known = [s.previous for s in statements if s.previous is not None]
    if known:
        previous = max(known)
        offered = {statements[rank].revision for rank in may}
        due = previous if previous in offered and previous + 1 not in offered else previous + 1
        why = f"the ranks agreed on revision {previous} last, so {due} is due"
    else:
        offers = Counter(statements[rank].revision for rank in may)
        due = max(offers, key=lambda revision: (offers[revision], revision))
        why = f"most ranks offer revision {due}"
    told = {
        rank: f"rank {rank} offers revision {statements[rank].revision}; {why}"
        for rank in may
        if statements[rank].revision != due
    }
    voters = [rank for rank in may if rank not in told]
    refusal = ""
    if not voters:
        refusal = f"no rank has a state to offer: {'; '.join(told.values())}"
    elif wrong := [r for r in told if statements[r].strategy is Strategy.SEND_ONLY]:
        refusal = f"a rank that may only send cannot be put right: {told[wrong[0]]}"
    return due, voters, told, refusal


def _unlike(statements: Sequence[Statement], voters: Sequence[int]) -> str:
    """Why hashes cannot be compared at all, if they cannot."""
    layouts = Counter(statements[rank].layout for rank in voters)
    common, _ = layouts.most_common(1)[0]
    count = next(len(statements[r].hashes) for r in voters if statements[r].layout == common)
    other = [
        rank for rank, s in enumerate(statements) if s.layout != common or len(s.hashes) != count
    ]
    if not other:
        return ""
    return (
        f"ranks {other} hold tensors of other names, dtypes or shapes than ranks "
        f"{[r for r in range(len(statements)) if r not in other]}: give every rank the same"
    )


def _tied(
    statements: Sequence[Statement],
    voters: Sequence[int],
    undecided: Sequence[int],
    names: Sequence[str],
) -> str:
    tensor = undecided[0]
    camps: dict[int, list[int]] = {}
    for rank in voters:
        camps.setdefault(statements[rank].hashes[tensor], []).append(rank)
    most = max(len(camp) for camp in camps.values())
    even = " and ".join(f"ranks {camp}" for camp in camps.values() if len(camp) == most)
    name = names[tensor] if names else f"tensor {tensor}"
    more = f" (and {len(undecided) - 1} more)" if len(undecided) > 1 else ""
    return f"no majority for {name}{more}: {even} differ, with {most} votes each"
