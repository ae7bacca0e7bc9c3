"""Findings: what ranks conclude among themselves, told to the coordinator by one of them."""

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from ftkit.core.ids import Seat
from ftkit.core.ids import Step as StepNumber
from ftkit.core.verdict import Fault
from ftkit.detection.signals import Found, to_json
from ftkit.session.parts import Parts


@dataclass(frozen=True, slots=True)
class Findings:
    """Tells of one rank's world."""

    parts: Parts

    def tells(self, accused: Collection[int]) -> bool:
        """Whether this rank is the one to tell: the first that is not accused, else the first."""
        size = self.parts.group.size
        innocent = [rank for rank in range(size) if rank not in accused]
        return self.parts.group.rank == (innocent[0] if innocent else 0)

    def tell(
        self,
        fault: Fault,
        rank: int,
        step: int,
        reason: str,
        *,
        evidence: Mapping[str, object],
        confidence: float = 1.0,
        peer: int | None = None,
    ) -> None:
        """Have it said of a rank of this world. Does not block; without an agent nobody hears it.

        Args:
          fault: what is wrong.
          rank: whose; a rank of the present world.
          step: at which step.
          reason: one sentence, with the numbers.
          evidence: JSON-safe.
          confidence: how sure.
          peer: the other rank, where only one of two can be meant.
        """
        if self.parts.control is None:
            return
        members = self.parts.group.world.members
        found = Found(
            fault=fault.value,
            member=members[rank].member,
            seat=members[rank].seat,
            step=StepNumber(step),
            at=time.monotonic(),
            reason=reason,
            evidence=evidence,
            confidence=confidence,
            peer=None if peer is None else Seat(members[peer].seat),
        )
        self.parts.control.report({"type": "signal", "signal": to_json(found)})
