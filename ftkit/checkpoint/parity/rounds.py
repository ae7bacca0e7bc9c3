"""Rounds: what one round of parity protects, as values that travel (pure).

A round makes parity of one snapshot on all nodes. Each group of nodes has its own stripes, and
its members know no more than what concerns them: a `StripeSet`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import lcm
from typing import Any, NamedTuple

from ftkit.checkpoint.slabs import CHUNK_BYTES_MAX
from ftkit.checkpoint.stripes import Code, StripePlan, deal, plan_stripes
from ftkit.core.errors import ProtocolError, UsageError
from ftkit.core.ids import Generation, NodeId, Seat, Step

Groups = tuple[tuple[NodeId, ...], ...]


class Ballot(NamedTuple):
    """A leader's right to be obeyed: of two, the higher counts. Never used twice."""

    number: int = 0
    leader: NodeId = NodeId(-1)

    @classmethod
    def from_json(cls, value: object) -> "Ballot":
        """Read the JSON of one. Raises ProtocolError on anything else."""
        if not isinstance(value, list) or [type(v) for v in value] != [int, int]:
            raise ProtocolError(f"not a ballot: {value!r:.80}")
        return cls(value[0], NodeId(value[1]))


#: Lower than any that a leader has.
NOBODY = Ballot()


class RoundId(NamedTuple):
    """A round's name, in the order of what is worth more: the newer snapshot."""

    generation: Generation
    step: Step
    ballot: Ballot
    """Two leaders may choose different parts of the same step; their shards must not be mixed."""

    @property
    def version(self) -> tuple[Generation, Step]:
        return self.generation, self.step

    @classmethod
    def from_json(cls, value: object) -> "RoundId":
        """Read the JSON of one. Raises ProtocolError on anything else."""
        if not isinstance(value, list) or [type(v) for v in value] != [int, int, list]:
            raise ProtocolError(f"not a round of parity: {value!r:.80}")
        return cls(Generation(value[0]), Step(value[1]), Ballot.from_json(value[2]))


@dataclass(frozen=True, slots=True, kw_only=True)
class PartRef:
    """One sealed part in an arena."""

    arena: str
    """File name, without directory."""
    seat: Seat
    step: Step
    generation: Generation
    bytes: int
    chunk_bytes: int

    def to_json(self) -> list[object]:
        return [self.arena, self.seat, self.step, self.generation, self.bytes, self.chunk_bytes]

    @classmethod
    def from_json(cls, value: object) -> "PartRef":
        """Read what `to_json` wrote. Raises ProtocolError on anything else."""
        if not isinstance(value, list) or [type(v) for v in value] != [str, *[int] * 5]:
            raise ProtocolError(f"not a part in an arena: {value!r:.80}")
        arena, seat, step, generation, count, chunk = value
        if count < 0 or not 0 < chunk <= CHUNK_BYTES_MAX:
            raise ProtocolError(f"a part of {count} bytes in chunks of {chunk} makes no sense")
        return cls(
            arena=arena,
            seat=Seat(seat),
            step=Step(step),
            generation=Generation(generation),
            bytes=count,
            chunk_bytes=chunk,
        )


@dataclass(frozen=True, kw_only=True)
class StripeSet:
    """What one round protects in one group of nodes."""

    round: RoundId
    code: Code
    groups: Groups
    """Of the whole job, this one among them: a step is restored whole or not at all."""
    parts: Mapping[NodeId, tuple[PartRef, ...]]
    """The parts on each node of this group; a node may have none, and keeps parity only."""

    @cached_property
    def plan(self) -> StripePlan:
        """The stripes. Pieces are cut where the chunks of every arena end."""
        align = lcm(*(p.chunk_bytes for parts in self.parts.values() for p in parts))
        sizes = {node: [p.bytes for p in parts] for node, parts in self.parts.items()}
        return plan_stripes(sizes, *self.code, align=align)

    def to_json(self) -> dict[str, object]:
        return {
            "round": self.round,
            "code": self.code,
            "groups": self.groups,
            "parts": {str(n): [p.to_json() for p in parts] for n, parts in self.parts.items()},
        }

    @classmethod
    def from_json(cls, value: object) -> "StripeSet":
        """Read what `to_json` wrote. Raises ProtocolError on anything else."""
        try:
            given: Any = value
            code = Code(*(int(v) for v in given["code"]))
            found = cls(
                round=RoundId.from_json(given["round"]),
                code=code,
                groups=groups_from_json(given["groups"]),
                parts={
                    NodeId(int(n)): tuple(map(PartRef.from_json, parts))
                    for n, parts in given["parts"].items()
                },
            )
            if tuple(sorted(found.parts)) not in found.groups:
                raise ProtocolError("parts are of nodes that are no group")
            if len(deal(found.parts, code)) != 1:
                raise ProtocolError("the nodes are more than one group")
        except (KeyError, TypeError, ValueError, AttributeError, UsageError) as error:
            raise ProtocolError(f"not a set of stripes: {value!r:.200}") from error
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """A round all of which a node holds: its parity shards, and its own parts."""

    round: RoundId
    groups: Groups
    m: int

    def to_json(self) -> dict[str, object]:
        return {"round": self.round, "groups": self.groups, "m": self.m}

    @classmethod
    def from_json(cls, value: object) -> "Holding":
        """Read what `to_json` wrote. Raises ProtocolError on anything else."""
        try:
            given: Any = value
            return cls(
                round=RoundId.from_json(given["round"]),
                groups=groups_from_json(given["groups"]),
                m=int(given["m"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ProtocolError(f"not a round that is held: {value!r:.200}") from error


def groups_from_json(value: Any) -> Groups:
    """Read the JSON of groups. TypeError or ValueError when they are none."""
    return tuple(tuple(NodeId(int(node)) for node in group) for group in value)
