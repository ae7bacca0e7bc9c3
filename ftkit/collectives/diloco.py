"""DiLoCo: many inner steps alone, then one outer step together (arXiv 2311.08105).

    diloco = DiLoCo(model.parameters(), group, repair=repair)
    diloco.join()
    while diloco.rounds < 1000:
        for batch in phase(diloco.rounds):      # H inner steps, with any optimizer
            loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        diloco.outer_step()

Members may come and go between outer steps and in the middle of one; see `rounds`. Inner
optimizers stay each member's own, as in the paper, and so do buffers of the model.
"""

from collections.abc import Iterable

import torch

from ftkit.collectives.group import Group
from ftkit.collectives.outer import Outer
from ftkit.collectives.rounds import Repair, Rounds


class DiLoCo:
    """See the module. Used by one thread, the one that trains."""

    _delay = 0
    """Rounds that are left under way when a call returns."""

    def __init__(
        self,
        params: Iterable[torch.Tensor],
        group: Group,
        *,
        repair: Repair,
        lr: float = 0.7,
        momentum: float = 0.9,
        codec: str | None = "int8",
        feedback: bool = False,
    ) -> None:
        """Prepare; no communication yet.

        Holds the outer parameters and momentum in host memory, float32, and as much again
        during an outer step, with `feedback` one or two copies more.

        Args:
          params: the model's, in the same order on every member. Written by `join` and
            `outer_step`, in place.
          group: the members. Nobody else issues collectives on its world while a call here runs.
          repair: called when a generation ended under a call here. Returns after
            the group was edited to a later world (by it, or by whom it waited for); raises to
            give up. Between calls, whoever trains may edit the group as it likes.
          lr: of the outer SGD.
          momentum: Nesterov momentum of the outer SGD.
          codec: how drifts travel: "int8", "fp8", "bf16", or None for the dtype they have.
          feedback: carry rounding errors over to the next outer step.

        Raises:
          ValueError: no parameters, an unknown codec, or numbers out of range.
        """
        self._outer = Outer(params, lr=lr, momentum=momentum)
        self._rounds = Rounds(
            self._outer, group, repair, delay=self._delay, codec=codec, feedback=feedback
        )

    @property
    def rounds(self) -> int:
        """Outer steps that were taken, the same on all members; -1 before `join`."""
        return self._rounds.applied

    @property
    def outer(self) -> Outer:
        """Outer parameters and momentum; to look at, and to save."""
        return self._outer

    def join(self) -> None:
        """Take part: every member's first call, at the start and as a newcomer. Blocks.

        At the start all take the parameters of rank 0. A newcomer waits for the members' next
        outer step, takes part in it without a drift of its own, and has then what they have.

        Raises:
          JobStopped, UsageError, and whatever `repair` raises: as `outer_step`.
        """
        self._rounds.join()
        self._outer.impose(self._rounds.under_way)

    def outer_step(self) -> None:
        """Reduce how far all members moved, take the outer step, reset the model. Blocks.

        Waits for the slowest member. A member that dies in the middle costs the others a
        repetition of the reduction, with a mean over those who are left.

        Raises:
          JobStopped: everybody who held the outer state is gone.
          UsageError: members differ in settings, or `join` was not called.
          whatever `repair` raises: then the model is as the inner steps left it.
        """
        self._rounds.advance(self._outer.drift())
        self._outer.impose()
