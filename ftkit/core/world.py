"""World: who is in the job in one generation, and where to reach them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ftkit.core.errors import ProtocolError
from ftkit.core.ids import Generation, MemberId, NodeId, Rank, Seat


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One live incarnation of a seat, and the address of its data plane."""

    member: MemberId
    seat: Seat
    node: NodeId
    host: str
    port: int

    def to_json(self) -> dict[str, object]:
        return {
            "member": self.member,
            "seat": self.seat,
            "node": self.node,
            "host": self.host,
            "port": self.port,
        }

    @classmethod
    def from_json(cls, value: object) -> "Member":
        """Read what `to_json` wrote. Raises ProtocolError on anything else."""
        if not isinstance(value, Mapping):
            raise ProtocolError(f"a member is a mapping, not {type(value).__name__}")
        try:
            return cls(
                member=MemberId(int(value["member"])),
                seat=Seat(int(value["seat"])),
                node=NodeId(int(value["node"])),
                host=str(value["host"]),
                port=int(value["port"]),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ProtocolError(f"not a member: {value!r}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """The members of one generation, in the order of their seats: position is rank.

    Two members never share a seat. A world is never edited, only replaced by one of a
    higher generation.
    """

    generation: Generation
    members: tuple[Member, ...]
    member_ids: frozenset[MemberId] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "member_ids", frozenset(m.member for m in self.members))
        seats = [m.seat for m in self.members]
        if seats != sorted(set(seats)):
            raise ValueError(f"members must be in order of distinct seats, got {seats}")

    @classmethod
    def of(cls, generation: Generation, members: Iterable[Member]) -> "World":
        """A world of these members, put in order."""
        return cls(generation=generation, members=tuple(sorted(members, key=lambda m: m.seat)))

    @property
    def size(self) -> int:
        return len(self.members)

    def first_on(self, node: NodeId) -> Member | None:
        """The member on `node` with the lowest seat; None when there is none."""
        there = [m for m in self.members if m.node == node]
        return min(there, key=lambda m: m.seat, default=None)

    def rank_of(self, member: MemberId) -> Rank | None:
        """The rank of `member` in this world, or None when it is not in it."""
        for rank, candidate in enumerate(self.members):
            if candidate.member == member:
                return Rank(rank)
        return None

    def to_json(self) -> dict[str, object]:
        return {
            "generation": self.generation,
            "members": [m.to_json() for m in self.members],
        }

    @classmethod
    def from_json(cls, value: object) -> "World":
        """Read what `to_json` wrote. Raises ProtocolError on anything else."""
        if not isinstance(value, Mapping) or not isinstance(value.get("members"), list):
            raise ProtocolError(f"not a world: {value!r}")
        try:
            return cls.of(
                Generation(int(value["generation"])),
                [Member.from_json(m) for m in value["members"]],
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ProtocolError(f"not a world: {value!r}") from error
