"""Replicas: now and then the ranks compare what all should hold alike, and mend what differs.

A digest of parameters and optimizer state rides on the ballot of a step, taken when backward is
over and the last gradients are on their way. Where one differs the vote does not pass; the ranks
find out whose tensors differ (`verify`), those who were outvoted fetch them anew, and the step is
played again: what a flipped bit had done to this step's gradients is gone with the attempt.

How often is a matter of cost (`cadence`): a digest that nobody else sent is compared with none.
"""

import time
from enum import StrEnum

import xxhash

from ftkit.collectives.state_hash import hash_of, layout_of
from ftkit.core.errors import IntegrityError
from ftkit.core.verdict import Fault
from ftkit.recovery.vote import Tally
from ftkit.session.cadence import Cadence
from ftkit.session.findings import Findings
from ftkit.session.parts import Parts
from ftkit.session.snapshots import Snapshots
from ftkit.session.verify import verify


class OnDiverged(StrEnum):
    """What becomes of a rank whose state is not that of the majority."""

    REPAIR = "repair"
    """It fetches what differs from the others."""
    EVICT = "evict"
    """It ends, and its replacement restores the state."""
    REPORT = "report"
    """It trains on. Nothing is compared any more."""


class Replicas:
    """Of one step loop; the training thread's."""

    def __init__(
        self, parts: Parts, snapshots: Snapshots, *, every: int | None, on_diverged: OnDiverged
    ) -> None:
        """Compare every so many steps.

        Args:
          parts: of this rank.
          snapshots: knows the protected tensors.
          every: steps between two looks, the same on all ranks; 0 for never, None for as often
            as `BUDGET` allows.
          on_diverged: what follows; the same on all ranks.
        """
        self._parts = parts
        self._snapshots = snapshots
        self._on_diverged = on_diverged
        self._cadence = Cadence(every)

    def digest(self, step: int) -> int:
        """64 bits over the state before `step` is applied; 0 when it is not looked at. Blocks."""
        # Before the first step there may be no optimizer state, and nothing is known of costs.
        if step < 2 or self._parts.group.size < 2 or not self._cadence.due(step):
            return 0
        began = time.perf_counter()
        tensors = self._snapshots.replicated(steady=True)
        digest = xxhash.xxh3_64(layout_of(tensors).to_bytes(8))
        for name in sorted(tensors):
            digest.update(hash_of(tensors[name]).to_bytes(8))
        self._cadence.took(time.perf_counter() - began)
        return digest.intdigest() or 1

    def committed(self) -> None:
        """A step was committed: learn how long steps take."""
        self._cadence.committed()

    def settle(self, result: Tally, step: int) -> None:
        """The vote on `step` was refused: find out who differs in what, and mend it. Blocks.

        A collective call: every rank that counted the vote makes it. When the world ends
        meanwhile, the next attempt finds the same again.

        Raises:
          IntegrityError: this rank is the one that differs, and it is to end, or could not be
            repaired.
        """
        found = verify(
            self._parts,
            self._snapshots,
            step=step - 1,
            repair=self._on_diverged is OnDiverged.REPAIR,
            steady=True,
            must=False,
        )
        if found.unknown:
            return
        if found.undecided or found.refusal or self._on_diverged is OnDiverged.REPORT:
            # It would be found at every step from here on.
            self._cadence.end()
        if found.undecided:
            self._tell_undecided(result, step, found.undecided)
        mine = [d.tensor for d in found.damaged if d.rank == self._parts.group.rank]
        if mine and self._on_diverged is OnDiverged.EVICT:
            raise IntegrityError(
                f"this rank holds other bits of {', '.join(mine[:3])} than the others; it ends, and "
                "its replacement restores the state from them"
            )

    def _tell_undecided(self, result: Tally, step: int, tensors: tuple[str, ...]) -> None:
        findings = Findings(self._parts)
        first, second, *_ = *result.odd, *result.odd
        if not findings.tells(()):
            return
        findings.tell(
            Fault.SDC,
            first,
            step - 1,
            f"ranks {list(result.odd)} hold different bits of {tensors[0]}"
            + (f" and {len(tensors) - 1} more tensors" if len(tensors) > 1 else "")
            + f" after step {step - 1}, and no majority says whose are wrong. It is not looked for "
            "any more; load a checkpoint, or train with three ranks or more",
            evidence={"kind": "replica", "tensors": list(tensors[:16]), "undecided": True},
            confidence=1 / len(result.odd),
            peer=second,
        )
