"""Inventory: which copy of which part of which snapshot lives where.

Ranks with the same layout hold the same state, and each captures a part of it: a range of
bytes of the layout's data. A snapshot is complete where the parts of every layout of the
job cover that layout. Checkpoint reports copies, recovery chooses a step from them, and
restore turns the choice into bytes. All are plain values, so a choice can be replayed from
its JSON.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from ftkit.core.errors import ProtocolError
from ftkit.core.ids import Generation, NodeId, Seat, Step


class Tier(StrEnum):
    """Where a copy lives, fastest first."""

    ARENA = "arena"
    PARITY = "parity"
    DISK = "disk"
    STORE = "store"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A range of bytes of the data of one layout."""

    layout: str
    """Digest of the layout: equal for ranks that hold the same state (replicas)."""
    first: int
    """Its first byte in the layout's data."""
    end: int
    """The byte after its last."""
    total: int
    """Bytes of the layout's data."""
    layouts: int = 1
    """How many different layouts make up the job's state; 1 when it is replicated."""

    def to_json(self) -> list[object]:
        return [self.layout, self.first, self.end, self.total, self.layouts]

    @classmethod
    def from_json(cls, value: object) -> "Part":
        """Read what `to_json` wrote. Raises ProtocolError on anything else."""
        if not isinstance(value, list) or [type(v) for v in value] != [str, int, int, int, int]:
            raise ProtocolError(f"not a part of a snapshot: {value!r}")
        layout, first, end, total, layouts = value
        part = cls(layout=layout, first=first, end=end, total=total, layouts=layouts)
        if not 0 <= part.first <= part.end <= part.total or part.layouts < 1:
            raise ProtocolError(f"part of a snapshot makes no sense: {value!r}")
        return part


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """One sealed copy of one part of a snapshot."""

    seat: Seat
    """The seat that captured it."""
    node: NodeId
    """The node that holds the bytes."""
    path: str
    """Where on that node: for an arena, the path of its file."""
    step: Step
    generation: Generation
    """The generation in which it was captured."""
    part: Part
    tier: Tier = Tier.ARENA

    def to_json(self) -> dict[str, object]:
        return {
            "seat": self.seat,
            "node": self.node,
            "path": self.path,
            "step": self.step,
            "generation": self.generation,
            "part": self.part.to_json(),
            "tier": self.tier.value,
        }

    @classmethod
    def from_json(cls, value: object) -> "Copy":
        """Read what `to_json` wrote. Raises ProtocolError on anything else."""
        if not isinstance(value, Mapping):
            raise ProtocolError(f"a copy is a mapping, not {type(value).__name__}")
        try:
            return cls(
                seat=Seat(int(value["seat"])),
                node=NodeId(int(value["node"])),
                path=str(value["path"]),
                step=Step(int(value["step"])),
                generation=Generation(int(value["generation"])),
                part=Part.from_json(value["part"]),
                tier=Tier(value["tier"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ProtocolError(f"not a copy: {value!r}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """All copies known at one moment, in no particular order."""

    copies: tuple[Copy, ...] = ()

    def complete(self) -> dict[Step, Generation]:
        """The steps that can be restored whole, each with the generation it counts for.

        That is the newest one whose parts, together with those of newer generations, cover
        every layout: a step whose parts were captured in two generations (a vote that was cut
        in half and rolled forward) counts for the older of the two. Sharded state is captured
        anew by all in each generation, perhaps in other shards: its generations do not mix.
        """
        found: dict[Step, Generation] = {}
        for step in {c.step for c in self.copies}:
            for generation in sorted({c.generation for c in self.at(step)}, reverse=True):
                parts = [c.part for c in self.of(step, generation)]
                if len(covered_layouts(parts)) >= max(p.layouts for p in parts):
                    found[step] = generation
                    break
        return found

    def of(self, step: Step, generation: Generation) -> tuple[Copy, ...]:
        """The copies that count for a step of a generation, from the newest on."""
        copies = self.at(step)
        layouts = max((c.part.layouts for c in copies if c.generation == generation), default=1)
        return tuple(
            c
            for c in copies
            if c.part.layouts == layouts
            and (c.generation == generation or (layouts == 1 and c.generation > generation))
        )

    def newest_complete(self) -> tuple[Generation, Step] | None:
        """The newest snapshot from which training can go on, or None when there is none.

        Newest is by generation first: after a roll back, an old step with a higher number may
        still lie in some arena, and it belongs to a history that was given up.
        """
        return max(((g, step) for step, g in self.complete().items()), default=None)

    def at(self, step: Step) -> tuple[Copy, ...]:
        """The copies of one step, from the newest generation to the oldest."""
        found = (c for c in self.copies if c.step == step)
        return tuple(sorted(found, key=lambda c: -c.generation))

    def without(self, *lost: Copy) -> "Inventory":
        """The same inventory less copies that turned out to be unreadable."""
        return Inventory(copies=tuple(c for c in self.copies if c not in lost))

    def to_json(self) -> dict[str, object]:
        return {"copies": [c.to_json() for c in self.copies]}

    @classmethod
    def from_json(cls, value: object) -> "Inventory":
        """Read what `to_json` wrote. Raises ProtocolError on anything else."""
        if not isinstance(value, Mapping) or not isinstance(value.get("copies"), list):
            raise ProtocolError(f"not an inventory: {value!r}")
        return cls(copies=tuple(Copy.from_json(c) for c in value["copies"]))


def covered_layouts(parts: Iterable[Part]) -> set[str]:
    """The layouts of which these parts together hold every byte; pure."""
    found, ends = set[str](), dict[str, int]()
    for part in sorted(parts, key=lambda p: (p.layout, p.first)):
        end = ends.get(part.layout, 0)
        if part.first <= end:
            ends[part.layout] = end = max(end, part.end)
        if end >= part.total:
            found.add(part.layout)
    return found
