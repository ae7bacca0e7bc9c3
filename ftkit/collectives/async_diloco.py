"""Async DiLoCo: the outer reduction runs beside the next inner steps, one step late.

    inner steps   phase k       phase k + 1       phase k + 2
    reduction                   of phase k        of phase k + 1
    outer step                              ▲ k               ▲ k + 1

At the end of a phase a member takes the outer step of the phase *before* (its sum has come in
meanwhile), starts the reduction of this one, and goes on at once from the new outer
parameters. Communication that is shorter than a phase costs nothing; the price is that each
outer gradient is applied one outer step late, as in PCCL's async DiLoCo (arXiv 2505.14065).
With that delay a large outer step overshoots: begin with lr 0.4 and momentum 0.6 or less.

A newcomer, or a fault, does not drain the pipeline: in the new generation the reduction under
way starts over from the drifts its members kept, the newcomer adds nothing to it and sees its
sum like everybody else.
"""

from collections.abc import Iterable

import torch

from ftkit.collectives.group import Group
from ftkit.collectives.outer import Outer
from ftkit.collectives.rounds import Repair, Rounds


class AsyncDiLoCo:
    """Used as `DiLoCo` is, with `finish` at the end. One thread, the one that trains."""

    def __init__(
        self,
        params: Iterable[torch.Tensor],
        group: Group,
        *,
        repair: Repair,
        lr: float = 0.4,
        momentum: float = 0.6,
        codec: str | None = "int8",
        feedback: bool = False,
    ) -> None:
        """Prepare; no communication yet. Arguments and errors are those of `DiLoCo`.

        `group` is in use between the calls too: nobody else issues collectives on its world.
        An edit between two calls starts the reduction under way over, at the next call.
        """
        self._outer = Outer(params, lr=lr, momentum=momentum)
        self._rounds = Rounds(self._outer, group, repair, delay=1, codec=codec, feedback=feedback)

    @property
    def rounds(self) -> int:
        """Outer steps that the model holds, the same on all members; -1 before `join`."""
        return self._rounds.applied

    @property
    def outer(self) -> Outer:
        """Outer parameters and momentum; to look at, and to save."""
        return self._outer

    def join(self) -> None:
        """Take part: every member's first call, at the start and as a newcomer. Blocks."""
        self._rounds.join()
        self._outer.impose()

    def outer_step(self) -> None:
        """End a phase: take the outer step of the one before, and start this one's reduction.

        Blocks only while the sum of the phase before is not there. Raises as `DiLoCo` does.
        """
        self._rounds.advance(self._outer.drift())
        self._outer.impose()

    def finish(self) -> None:
        """Take the outer step under way: the last call, by every member alike. Blocks."""
        self._rounds.drain()
        self._outer.impose()
