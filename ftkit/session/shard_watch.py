"""ShardWatch: what a rank alone holds must not change from one optimizer step to the next.

A shard has no replica to be compared with. But forward and backward only read it: so its tensors
are hashed right after an optimizer has stepped, and again right before the next does, every k-th
step (`cadence`). Where one differs memory has changed by itself, or the script has changed it.

A script that does so changes many tensors, or does it from the beginning: then nothing is said, and
nothing is looked at any more. Else the rank and the tensors are told, and under
`OnDiverged.EVICT` the rank ends: its replacement loads the step from what was captured of it. A
flip in that moment between the optimizer and the copy is in the copy as well.
"""

import logging
import time

import torch

from ftkit.collectives.state_hash import hash_of
from ftkit.core.errors import IntegrityError
from ftkit.core.ids import Generation
from ftkit.core.verdict import Fault
from ftkit.session.cadence import Cadence
from ftkit.session.findings import Findings
from ftkit.session.parts import Parts
from ftkit.session.replicas import OnDiverged
from ftkit.session.snapshots import Snapshots

logger = logging.getLogger(__name__)

#: Looks without a difference after which one is no habit of the script.
CLEAN_MIN = 3
#: More tensors than this do not go wrong at once.
TENSORS_MAX = 2


class ShardWatch:
    """Of one step loop; the training thread's."""

    def __init__(
        self, parts: Parts, snapshots: Snapshots, *, every: int | None, on_diverged: OnDiverged
    ) -> None:
        """Look every so many steps: 0 for never, None for as often as the budget allows."""
        self._parts = parts
        self._snapshots = snapshots
        self._on_diverged = on_diverged
        self._cadence = Cadence(every)
        self._known: tuple[Generation, int, dict[str, int]] | None = None
        """Generation and step after which these hashes were taken."""
        self._clean = 0

    def committed(self, step: int) -> None:
        """The optimizers have made `step`: hash what is held now, if the next is one to look at."""
        self._cadence.committed()
        self._known = None
        if self._cadence.due(step + 1):
            began = time.perf_counter()
            generation = self._parts.group.world.generation
            self._known = generation, step, self._hashes()
            self._cadence.took(2 * (time.perf_counter() - began))

    def look(self, step: int) -> None:
        """The optimizers are about to make `step`: compare. Blocks for one pass over the shards.

        Raises:
          IntegrityError: something has changed, and the rank is to be replaced for it.
        """
        known, self._known = self._known, None
        if known is None or known[:2] != (self._parts.group.world.generation, step - 1):
            return
        before, now = known[2], self._hashes()
        changed = sorted(n for n in before if n in now and before[n] != now[n])
        if not changed:
            self._clean += 1
            return
        if self._clean < CLEAN_MIN or len(changed) > TENSORS_MAX:
            logger.info(
                "%d tensors change between steps: the script does so, and shards are not watched",
                len(changed),
            )
            self._cadence.end()
            return
        self._clean = 0  # it is said again only after so many that are sound
        names = ", ".join(changed)
        rank = self._parts.group.rank
        Findings(self._parts).tell(
            Fault.SDC,
            rank,
            step - 1,
            f"{names} of rank {rank} changed after step {step - 1}, and before an optimizer made "
            f"step {step}: memory changes by itself there, unless the script did it",
            evidence={"kind": "shard", "tensors": changed},
            confidence=0.8,
        )
        if self._on_diverged is OnDiverged.EVICT:
            raise IntegrityError(
                f"{names} of this rank changed between two optimizer steps; it ends, and its "
                "replacement loads them from what was captured"
            )

    def _hashes(self) -> dict[str, int]:
        tensors: dict[str, torch.Tensor] = self._snapshots.steady()
        return {name: hash_of(tensor) for name, tensor in tensors.items()}
