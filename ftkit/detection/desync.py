"""Desync: members whose scripts called different collectives, found by comparing their records.

The n-th collective of a group must be the same one on every member: the same operation, on the
same type and size. Where it is not, most members are taken to be right; among two nobody can
say who is. What the one did instead shows in the order of the others: it skipped, repeated or
swapped a collective, or called the right one with another size, type or reduction.

The first difference counts. What comes after it follows from it.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import takewhile
from typing import Final

from ftkit.core.ids import Generation, MemberId
from ftkit.detection.row import OpRecord

#: Collectives of which every member has the same number of bytes. In others ranks may differ.
_SIZED: Final = frozenset({"all_reduce", "reduce", "reduce_scatter", "broadcast", "all_gather"})

#: Of calls that came before alike, fewer say nothing.
_SAME_MIN: Final = 2

_REDUCTIONS: Final = frozenset({"sum", "avg", "product", "min", "max", "band", "bor", "bxor"})


class Slip(StrEnum):
    """What a member did that the others did not."""

    SKIPPED = "skipped"
    REPEATED = "repeated"
    SWAPPED = "swapped"
    SIZE = "size"
    DTYPE = "dtype"
    REDUCTION = "reduction"
    OTHER = "other"
    """It called another collective, and nothing shows why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What was called: the operation with its type, and the bytes."""

    op: str
    nbytes: int

    @classmethod
    def of(cls, record: OpRecord) -> "Call":
        """What `record` tells, without the bytes where ranks may differ in them."""
        sized = record.op.partition(" ")[0] in _SIZED
        return cls(op=record.op, nbytes=record.nbytes if sized else -1)

    def __str__(self) -> str:
        return self.op if self.nbytes < 0 else f"{self.op} of {self.nbytes} bytes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Disagreement:
    """One collective at which members of a group parted."""

    generation: Generation
    group: int
    seq: int
    usual: Call
    """What most called, or what used to be called there; else what one of them did."""
    members: int
    """Who has come so far: those that are counted."""
    awaited: int
    """Who calls collectives of this group, and has not come to this one."""
    at_ns: int
    """When the last of them entered it, in its own monotonic ns."""
    slips: Mapping[MemberId, tuple[Slip, Call]]
    """Who called something else, and what. Everybody, where nobody can say what is right."""
    majority: bool
    """Whether most members called the same."""
    by_history: bool
    """Whether, without a majority, what came before says what is right."""

    @property
    def decided(self) -> bool:
        """Whether it is known what is right."""
        return self.majority or self.by_history


_Calls = Mapping[MemberId, Mapping[int, OpRecord]]


def disagreements(histories: Mapping[MemberId, Iterable[OpRecord]]) -> list[Disagreement]:
    """The first difference of each group in each generation. Pure.

    Args:
      histories: the newest records of each member, as far back as they go.
    """
    groups: dict[tuple[Generation, int], dict[MemberId, dict[int, OpRecord]]] = {}
    for member, records in histories.items():
        for r in records:
            if r.op.startswith(("send ", "recv ")):
                continue  # counted for each pair apart
            calls = groups.setdefault((r.generation, r.group), {})
            calls.setdefault(member, {})[r.seq] = r
    found = list[Disagreement]()
    for (generation, group), calls in groups.items():
        before = [c for (g, other), c in groups.items() if other == group and g < generation]
        if len(calls) > 1 and (one := _first(generation, group, calls, before)) is not None:
            found.append(one)
    return found


def _first(
    generation: Generation, group: int, calls: _Calls, before: Sequence[_Calls]
) -> Disagreement | None:
    for seq in sorted({seq for records in calls.values() for seq in records}):
        here = {m: records[seq] for m, records in calls.items() if seq in records}
        told = Counter(Call.of(r) for r in here.values())
        if len(told) < 2:
            continue
        usual, most = told.most_common(1)[0]
        majority, foretold = most * 2 > len(here), None
        if not majority:
            past = [
                _line(other, max(max(records) for records in other.values())) for other in before
            ]
            foretold = _foretold(_line(calls, seq - 1), past, told.keys())
            usual = foretold or usual
        decided = majority or foretold is not None
        model = next(calls[m] for m, r in here.items() if Call.of(r) == usual)
        slips = {
            m: (_slip(calls[m], model, seq), Call.of(r))
            for m, r in here.items()
            if not decided or Call.of(r) != usual
        }
        return Disagreement(
            generation=generation,
            group=group,
            seq=seq,
            usual=usual,
            members=len(here),
            awaited=len(calls) - len(here),
            at_ns=max(r.t_enter_ns for r in here.values()),
            slips=slips,
            majority=majority,
            by_history=foretold is not None,
        )
    return None


def _line(calls: _Calls, last: int) -> list[Call]:
    """What was called up to `last`, as far back as it is known without a gap. The newest first."""
    known = {seq: r for records in calls.values() for seq, r in records.items()}
    line = list[Call]()
    while (record := known.get(last)) is not None:
        line.append(Call.of(record))
        last -= 1
    return line


def _foretold(
    line: Sequence[Call], before: Sequence[Sequence[Call]], told: Collection[Call]
) -> Call | None:
    """Which of `told` came next, the last times that the same calls had come before.

    For each the longest run of calls is looked for that ends `line`, and that it has followed. One
    of them has to have followed a longer one than all others.

    Args:
      line: what came before, the newest first.
      before: likewise, of generations before.
      told: the calls in question.
    """
    longest = dict.fromkeys(told, 0)
    for known in (line, *before):
        for i, call in enumerate(known):
            if call in longest:
                pairs = zip(known[i + 1 :], line, strict=False)
                same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
                longest[call] = max(longest[call], same)
    best, second = sorted(longest.values(), reverse=True)[:2]
    if best < _SAME_MIN or best == second:
        return None
    return max(longest, key=longest.__getitem__)


def _slip(mine: Mapping[int, OpRecord], model: Mapping[int, OpRecord], seq: int) -> Slip:
    """How `mine` came to differ from `model` at `seq`."""
    ours, theirs = Call.of(mine[seq]), Call.of(model[seq])
    if ours == theirs:
        return Slip.OTHER  # of the side that is compared with
    follows = _next(model, seq)
    if follows == ours:
        return Slip.SWAPPED if _next(mine, seq) == theirs else Slip.SKIPPED
    if seq - 1 in model and Call.of(model[seq - 1]) == ours:
        return Slip.REPEATED
    words, others = ours.op.split(), theirs.op.split()
    if words[:1] != others[:1]:
        return Slip.OTHER
    changed = set(words) ^ set(others)
    if changed & _REDUCTIONS:
        return Slip.REDUCTION
    if not changed or all(word.isdigit() for word in changed):
        return Slip.SIZE
    return Slip.DTYPE


def _next(records: Mapping[int, OpRecord], seq: int) -> Call | None:
    """What follows `seq`, or what followed the same call the last time."""
    if seq + 1 in records:
        return Call.of(records[seq + 1])
    same = Call.of(records[seq])
    before = [s for s, r in records.items() if s < seq and s + 1 in records and Call.of(r) == same]
    return Call.of(records[max(before) + 1]) if before else None


_DID: Final[Mapping[Slip, str]] = {
    Slip.SKIPPED: "skipped it and went on to",
    Slip.REPEATED: "called the one before again:",
    Slip.SWAPPED: "called the next one first:",
    Slip.SIZE: "called it with another size:",
    Slip.DTYPE: "called it with another type:",
    Slip.REDUCTION: "called it with another reduction:",
    Slip.OTHER: "called",
}


def reason(found: Disagreement, member: MemberId, seat: int) -> str:
    """One sentence about one member."""
    slip, call = found.slips[member]
    place = f"collective {found.seq} of group {found.group}"
    if found.by_history:
        return (
            f"at {place}, where {found.usual} came next each time before, seat {seat} (member "
            f"{member}) {_DID[slip]} {call}: the script's ranks call different collectives"
        )
    if not found.majority:
        others = sorted({str(c) for _, c in found.slips.values() if c != call})
        return (
            f"at {place} seat {seat} (member {member}) called {call} and others "
            f"{' and '.join(others)}: the script's ranks disagree, and without a majority nobody "
            "can say which is right"
        )
    right = found.members - len(found.slips)
    return (
        f"at {place}, where {right} of {found.members} members called {found.usual}, seat {seat} "
        f"(member {member}) {_DID[slip]} {call}: the script's ranks call different collectives"
    )


def evidence(found: Disagreement, member: MemberId) -> dict[str, object]:
    """The facts, JSON-safe: both sides' signatures."""
    slip, call = found.slips[member]
    return {
        "kind": str(slip),
        "generation": found.generation,
        "group": found.group,
        "seq": found.seq,
        "ours": {"op": call.op, "nbytes": call.nbytes if call.nbytes >= 0 else None},
        "theirs": {
            "op": found.usual.op,
            "nbytes": found.usual.nbytes if found.usual.nbytes >= 0 else None,
        },
        "members": found.members,
        "slipped": sorted(found.slips),
        "majority": found.majority,
        "by_history": found.by_history,
    }
