"""Async DiLoCo: the outer reduction runs beside the next inner steps, one step late.

    inner steps   phase k       phase k + 1       phase k + 2
    reduction                   of phase k        of phase k + 1
    outer step                              ▲ k               ▲ k + 1

At the end of a phase a member takes the outer step of the phase *before* (its sum has come in
meanwhile), starts the reduction of this one, and goes on at once: from the new outer
parameters, moved on by its own drift, which is still on its way to the others. Communication
that is shorter than a phase costs nothing; the price is that each outer gradient is applied
one outer step late, as in PCCL's async DiLoCo (arXiv 2505.14065). Keeping one's own drift
meanwhile is what makes up for that (compare arXiv 2502.12996): beginning each phase without it
learns markedly worse and wants far smaller outer steps.

A newcomer, or a fault, does not drain the pipeline: in the new generation the reduction under
way starts over from the drifts its members kept, the newcomer adds nothing to it and sees its
sum like everybody else.
"""

from collections.abc import Iterable

import torch

from ftkit.collectives.diloco import DiLoCo
from ftkit.collectives.group import Group
from ftkit.collectives.rounds import Repair


class AsyncDiLoCo(DiLoCo):
    """Used as `DiLoCo` is, with `finish` at the end. One thread, the one that trains."""

    _delay = 1

    def __init__(
        self,
        params: Iterable[torch.Tensor],
        group: Group,
        *,
        repair: Repair,
        lr: float = 0.7,
        momentum: float = 0.6,
        codec: str | None = "int8",
        feedback: bool = False,
    ) -> None:
        """Prepare; no communication yet. Arguments and errors are those of `DiLoCo`.

        `group` is in use between the calls too: nobody else issues collectives on its world.
        An edit between two calls starts the reduction under way over, at the next call. Needs
        one float32 copy of the parameters more.
        """
        super().__init__(
            params,
            group,
            repair=repair,
            lr=lr,
            momentum=momentum,
            codec=codec,
            feedback=feedback,
        )

    def outer_step(self) -> None:
        """End a phase: take the outer step of the one before, and start this one's reduction.

        Blocks only while the sum of the phase before is not there. Raises as `DiLoCo` does.
        """
        drift = self._outer.drift()
        if self._rounds.under_way is not None:
            drift.sub_(self._rounds.under_way)  # the phase began that far ahead
        self._rounds.advance(drift)
        self._outer.impose(self._rounds.under_way)

    def finish(self) -> None:
        """Take the outer step under way, straight after the last `outer_step`. Blocks.

        The last call, by every member alike: only now are their models the same.
        """
        self._rounds.drain()
        self._outer.impose()
