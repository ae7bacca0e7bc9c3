"""Approximation: what a job may go on from when part of its newest state is nowhere. Pure.

Only for a job that allows it, and only once no tier of memory has a whole step: what survivors
hold stays as it is, and the lost shards come from elsewhere. In the order of preference::

    memory, parity   exact; while they have a step whole, nothing here is asked
    checkpoint       exact, all go back; when it is no more steps old than the next way sets back
    stale shard      the lost shards alone from an older copy of theirs: in another node's memory,
                     or in the checkpoint, whichever is newer
    CheckFree        a lost stage in the middle of a pipeline, from its two neighbours
    CheckFree+       the first or the last as well, from the one beside it, in a pipeline that has
                     them change places on every other micro-batch

The last three are weighed in steps: a checkpoint costs those that are played again, an approximation
those that it sets training back by, in effect (`Costs.stale_lost_steps`, `checkfree_lost_steps`; a
copy that is younger than that sets back by its age at most). Of equal costs the exact way wins.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ftkit.core.errors import ProtocolError
from ftkit.core.ids import Generation, Seat, Step
from ftkit.core.inventory import Copy, Inventory, covered_layouts
from ftkit.recovery.costs import Costs
from ftkit.recovery.facts import Allowed
from ftkit.recovery.policy import Option


@dataclass(frozen=True, slots=True, kw_only=True)
class OldShard:
    """A copy of a seat's shard that another node keeps, older than the arenas' steps."""

    copy: Copy
    host: str
    """Of the byte server that has it."""
    port: int

    def to_json(self) -> list[object]:
        return [self.copy.to_json(), self.host, self.port]

    @classmethod
    def from_json(cls, value: Any) -> "OldShard":
        """Read what `to_json` wrote. Raises ProtocolError on anything else."""
        try:
            copy, host, port = value
            return cls(copy=Copy.from_json(copy), host=str(host), port=int(port))
        except (TypeError, ValueError) as error:
            raise ProtocolError(f"not an old copy of a shard: {value!r:.200}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Approximation:
    """Where each part of the state comes from, as all ranks are told in the plan."""

    way: Option
    """`STALE_SHARD`, `CHECKFREE` or, where an outer stage is among the lost, `CHECKFREE_PLUS`."""
    step: Step
    """Of what is left: where the job goes on."""
    generation: Generation
    """In which that was captured."""
    seats: tuple[Seat, ...]
    """Of the world of that generation, in the order of ranks; empty where it is not known."""
    lost: tuple[Seat, ...]
    """Of these, those whose shards are lost."""
    layouts: int
    """Different layouts of which the arenas still have every byte."""
    old: tuple[OldShard, ...] = ()
    """STALE_SHARD: a copy for each lost seat; none where the checkpoint has it."""
    checkpoint: Step = Step(0)
    """STALE_SHARD: which; 0 where `old` has it."""

    @property
    def age(self) -> int:
        """By how many steps what replaces the lost shards is older than the rest."""
        if self.way is not Option.STALE_SHARD:
            return 0
        from_ = min((o.copy.step for o in self.old), default=self.checkpoint)
        return max(0, self.step - from_)

    def describe(self) -> str:
        """What replaces what, in words."""
        which = f"the shards of seats {list(self.lost)}" if self.lost else "lost shards"
        if self.way is Option.CHECKFREE:
            return f"{which} are averaged from their neighbours (CheckFree): an approximation"
        if self.way is Option.CHECKFREE_PLUS:
            return (
                f"{which} are taken over from their neighbours, of which the outer ones' have learned "
                "their parts (CheckFree+): an approximation"
            )
        where = f"checkpoint {self.checkpoint}" if self.checkpoint else "other nodes' memory"
        return f"{which} are {self.age} steps older, from {where}: an approximation"

    def to_json(self) -> dict[str, object]:
        return {
            "way": self.way.value,
            "step": self.step,
            "generation": self.generation,
            "seats": list(self.seats),
            "lost": list(self.lost),
            "layouts": self.layouts,
            "old": [o.to_json() for o in self.old],
            "checkpoint": self.checkpoint,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Approximation":
        """Read what `to_json` wrote. Raises ProtocolError on anything else."""
        try:
            return cls(
                way=Option(value["way"]),
                step=Step(int(value["step"])),
                generation=Generation(int(value["generation"])),
                seats=tuple(Seat(int(s)) for s in value["seats"]),
                lost=tuple(Seat(int(s)) for s in value["lost"]),
                layouts=int(value["layouts"]),
                old=tuple(map(OldShard.from_json, value["old"])),
                checkpoint=Step(int(value["checkpoint"])),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ProtocolError(f"not an approximation: {value!r:.200}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Remains:
    """The newest step of which arenas still have a part, and what of it they have not."""

    step: Step
    generation: Generation
    layouts: int
    """Layouts that are whole."""
    of: int
    """Layouts that make up the state."""
    whole: frozenset[str]
    present: frozenset[Seat]
    """Who captured those."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What to go on from, or why nothing will do."""

    taken: Approximation | None = None
    """None: go on from the checkpoint, or not at all."""
    reason: str = ""
    """For people: what decided, or what was lost and what stands in the way of each way."""


def remains(inventory: Inventory) -> Remains | None:
    """What arenas have left of the newest step; None where they have nothing of sharded state.

    Of several steps and generations that which keeps the most bytes, then the newest: survivors
    may differ by a step or two.
    """
    found = defaultdict[tuple[Generation, Step], list[Copy]](list)
    for copy in inventory.copies:
        if copy.part.layouts > 1:
            found[copy.generation, copy.step].append(copy)
    best: tuple[tuple[int, Generation, Step], Remains] | None = None
    for (generation, step), copies in found.items():
        whole = frozenset(covered_layouts(c.part for c in copies))
        kept = sum({c.part.layout: c.part.total for c in copies if c.part.layout in whole}.values())
        rank = (kept, generation, step)
        if whole and (best is None or rank > best[0]):
            best = (
                rank,
                Remains(
                    step=step,
                    generation=generation,
                    layouts=len(whole),
                    of=max(c.part.layouts for c in copies),
                    whole=whole,
                    present=frozenset(c.seat for c in copies if c.part.layout in whole),
                ),
            )
    return best[1] if best else None


def judge(
    left: Remains | None,
    *,
    allowed: Allowed,
    seats: Sequence[Seat] = (),
    old: Sequence[OldShard] = (),
    checkpoint: Step | None = None,
    costs: Costs,
) -> Judgement:
    """What a job goes on from whose arenas and parity have no step whole.

    Args:
      left: of the newest step.
      allowed: what the script allows, and of which kind of state.
      seats: of the world that captured it, in the order of ranks; none where it is not known.
      old: older copies of shards, in the memory of living nodes.
      checkpoint: the newest on disk that is good; None when there is none.
      costs: what approximations set training back by.
    """
    if left is None:
        return Judgement(reason="no node has anything left in memory")
    lost = [s for s in seats if s not in left.present]
    what = f"of step {left.step} the shards of seats {lost} are lost" if lost else (
        f"of step {left.step} {left.of - left.layouts} of {left.of} shards are lost"
    )  # fmt: skip
    if not allowed:
        return Judgement(reason=what)
    base: dict[str, Any] = {
        "step": left.step,
        "generation": left.generation,
        "seats": tuple(seats),
        "lost": tuple(lost),
        "layouts": left.layouts,
    }
    ways, barred = list[tuple[float, Approximation]](), list[str]()
    stale = _stale(left, lost, old, checkpoint, base)
    if stale is None:
        barred.append(f"nobody keeps an older copy of {'it' if len(lost) == 1 else 'all of them'}")
    else:
        ways.append((min(costs.stale_lost_steps, stale.age), stale))
    if why := _no_average(allowed, seats, lost):
        barred.append(why)
    else:
        outer = {seats[0], seats[-1]} & set(lost)
        mean = Option.CHECKFREE_PLUS if outer else Option.CHECKFREE
        ways.append((costs.checkfree_lost_steps, Approximation(way=mean, **base)))
    back = None if checkpoint is None else max(0, left.step - checkpoint)
    loses, way = min(ways, key=lambda w: w[0], default=(None, None))
    if way is None or loses is None:
        return Judgement(reason=f"{what}; {'; '.join(barred)}")
    if back is not None and back <= loses:
        return Judgement(
            reason=f"{what}; all go back {back} steps to the checkpoint, where {way.way} would set "
            f"training back by {loses:g}"
        )
    told = f"; the checkpoint is {back} steps old" if back is not None else ""
    return Judgement(
        taken=way, reason=f"{what}; {way.describe()}, taken to cost {loses:g} steps{told}"
    )


def _stale(
    left: Remains,
    lost: Sequence[Seat],
    old: Sequence[OldShard],
    checkpoint: Step | None,
    base: Mapping[str, Any],
) -> Approximation | None:
    """The newest older copies of what is lost."""
    found = list[Approximation]()
    newest = dict[Seat, OldShard]()
    for one in sorted(old, key=lambda o: o.copy.step):
        # One of another generation was cut for another world, and one that is left is not needed.
        if one.copy.generation == left.generation and one.copy.part.layout not in left.whole:
            newest[one.copy.seat] = one
    enough = {newest[s].copy.part.layout for s in lost if s in newest}
    if lost and len(enough) == left.of - left.layouts:
        kept = tuple(newest[s] for s in lost if s in newest)
        found.append(Approximation(way=Option.STALE_SHARD, old=kept, **base))
    if checkpoint is not None:
        found.append(Approximation(way=Option.STALE_SHARD, checkpoint=checkpoint, **base))
    return min(found, key=lambda a: a.age, default=None)


def _no_average(allowed: Allowed, seats: Sequence[Seat], lost: Sequence[Seat]) -> str:
    """Why the lost shards cannot be made of their neighbours; empty when they can."""
    if allowed not in (Allowed.STAGES, Allowed.SWAPPED):
        return "CheckFree is for the stages of a pipeline"
    if not lost:
        return "CheckFree needs to know which stages are lost, and nobody does any more"
    ranks = [seats.index(s) for s in lost]
    if any(abs(a - b) == 1 for a in ranks for b in ranks):
        return f"CheckFree cannot: stages {ranks} are neighbours, each lacks one of its own"
    edges = [r for r in ranks if r in (0, len(seats) - 1)]
    if edges and len(seats) == 1:
        return "CheckFree cannot: there was one stage, and it has no neighbour"
    if edges and allowed is not Allowed.SWAPPED:
        return (
            f"CheckFree cannot: stage {edges[0]} is the {'first' if edges[0] == 0 else 'last'}, with "
            "one neighbour; CheckFree+ needs micro-batches that run the outer stages swapped: "
            'allow_approximate="checkfree+"'
        )
    return ""
