"""Inventory: which copy of which snapshot lives where.

Detection and checkpoint report copies, recovery chooses a step from them, and restore turns
the choice into bytes. It is a plain value, so a choice can be replayed from its JSON.
"""

from collections.abc import Collection, Mapping
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
class Copy:
    """One sealed copy of one seat's part of a snapshot."""

    seat: Seat
    """The seat whose state it is."""
    node: NodeId
    """The node that holds the bytes."""
    path: str
    """Where on that node: for an arena, the path of its file."""
    step: Step
    generation: Generation
    """The generation in which the step was committed."""
    tier: Tier = Tier.ARENA

    def to_json(self) -> dict[str, object]:
        return {
            "seat": self.seat,
            "node": self.node,
            "path": self.path,
            "step": self.step,
            "generation": self.generation,
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
                tier=Tier(value["tier"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ProtocolError(f"not a copy: {value!r}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """All copies known at one moment, in no particular order."""

    copies: tuple[Copy, ...] = ()

    def newest_complete(self, seats: Collection[Seat] = ()) -> tuple[Generation, Step] | None:
        """The newest snapshot from which training can go on, or None when there is none.

        Args:
          seats: the seats whose parts are all needed, when state is sharded. Empty when it
            is replicated: then any single copy is a whole snapshot.

        Newest is by generation first: after a roll back, an old step with a higher number may
        still lie in some arena, and it belongs to a history that was given up. A step whose
        parts were committed in two generations (a vote that was cut in half and rolled
        forward) counts as the older of the two.
        """
        if not seats:
            return max(((c.generation, c.step) for c in self.copies), default=None)
        best: dict[Step, dict[Seat, Generation]] = {}
        for copy in self.copies:
            parts = best.setdefault(copy.step, {})
            parts[copy.seat] = max(parts.get(copy.seat, copy.generation), copy.generation)
        needed = set(seats)
        return max(
            (
                (min(parts[seat] for seat in needed), step)
                for step, parts in best.items()
                if needed <= parts.keys()
            ),
            default=None,
        )

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
