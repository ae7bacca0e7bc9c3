"""Survivors: who goes on after a member died, agreed on by those who are left. Pure.

Each survivor tells the others whom it has lost, ever, and how many operations it has
committed on each channel; again whenever the first changes. It has an agreement when
everybody whom it has not lost says the same. Losses only add up, so this ends; and because
they are counted from the beginning, the next generation's number follows from them alone:
one who learned of two deaths at once meets those who went through one after the other.

Where two members have lost each other and both live, the rest believe both: both are left
behind, and learn it when they hear that they are counted among the lost.

Statements are made between two generations only, when nothing can be committed; so those of
an agreement count the same operations. A committed operation is one whose result everybody
holds (`mending`): if any survivor counts it, all may complete it, otherwise none has.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from ftkit.core.errors import ProtocolError
from ftkit.core.ids import MemberId


@dataclass(frozen=True, slots=True)
class Statement:
    """What one survivor knows."""

    lost: frozenset[MemberId]
    committed: Mapping[int, int] = field(default_factory=dict)
    """Operations committed on each channel, by its id."""

    def to_bytes(self) -> bytes:
        return json.dumps(
            {"lost": sorted(self.lost), "committed": sorted(self.committed.items())}
        ).encode()

    @classmethod
    def from_bytes(cls, payload: bytes) -> "Statement":
        """Read what `to_bytes` wrote. Raises ProtocolError on anything else."""
        try:
            value = json.loads(payload)
            lost = frozenset(MemberId(int(m)) for m in value["lost"])
            committed = {int(channel): int(count) for channel, count in value["committed"]}
        except (ValueError, KeyError, TypeError) as error:
            raise ProtocolError(f"not a statement of a survivor: {error}") from error
        return cls(lost, committed)


def agreed(
    mine: Statement, others: Mapping[MemberId, Statement], living: frozenset[MemberId]
) -> bool:
    """Whether all of `living`, who are the others we have not lost, say what we say."""
    return all(m in others and others[m].lost == mine.lost for m in living)


def may_go_on(world: frozenset[MemberId], living: frozenset[MemberId]) -> bool:
    """Whether `living` members of `world` may go on without the others.

    They must be more than half; of two halves, the one with the lowest member. So two parts
    of a cut network never both go on.
    """
    if 2 * len(living) == len(world):
        return min(world) in living
    return 2 * len(living) > len(world)


def committed_anywhere(channel: int, statements: list[Statement]) -> int:
    """How many operations of `channel` are held by all."""
    return max((s.committed.get(channel, 0) for s in statements), default=0)
