"""Approximate recovery of one pipeline stage whose state is nowhere any more. Opt-in, never silent.

Three ways, for when neither memory nor parity has the state (`recovery.policy` weighs them against
the disk). Each changes the result of the training, so each wants `allow_approximate=True`, logs a
warning, and tells an event:

* `StaleShard`: the lost stage alone goes back to its own older snapshot; nobody else does.
* `rebuild_between`: the mean of both neighbours' weights, each weighted with the squared norm of its last
  gradient (CheckFree, arXiv 2506.15461). For stages in between, of one shape.
* `copy_neighbour`: a neighbour's weights as they are, for the first and last stage. Meant for pipelines that
  swap their outer stages on every other micro-batch, so that neighbours learn each other's part
  (CheckFree+); that swap has a price of its own at every step, failure or not.

After the last two the optimizer's moments say nothing of the new weights: `fresh_optimizer` clears them and
raises the stage's learning rate. Not thread-safe; call between steps.
"""

import copy
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ftkit.core.errors import UsageError

logger = logging.getLogger(__name__)

#: What CheckFree raises a rebuilt stage's learning rate by.
LR_RAISE = 1.1

#: Writes an event of this kind with these fields: `Trace.event`.
Tell = Callable[..., None]


def permit(allow_approximate: bool, *, way: str, stage: int, tell: Tell, **what: object) -> None:
    """Log and tell that a stage is about to be approximated.

    Raises:
      UsageError: it is not allowed. Nothing was touched.
    """
    if not allow_approximate:
        raise UsageError(
            f"stage {stage} could only be recovered by {way}, which changes the result of the "
            "training; pass allow_approximate=True to accept that, or restart from a checkpoint"
        )
    logger.warning(
        "stage %d is recovered by %s: the result is not that of an undisturbed run", stage, way
    )
    tell("approximate", way=way, stage=stage, **what)


class StaleShard:
    """The newest older copy of one stage: parameters, buffers and optimizer state, in memory."""

    def __init__(self, stage: int, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._stage, self._module, self._optimizer = stage, module, optimizer
        self._kept: tuple[int, dict[str, Any], dict[str, Any]] | None = None

    @property
    def step(self) -> int | None:
        """The step it holds; None before the first."""
        return None if self._kept is None else self._kept[0]

    def capture(self, step: int) -> None:
        """Copy the stage as it is after `step`. Blocks for one pass over its state."""
        state = {k: v.detach().clone() for k, v in self._module.state_dict().items()}
        self._kept = step, state, copy.deepcopy(self._optimizer.state_dict())

    def restore(self, *, now: int, allow_approximate: bool, tell: Tell) -> int:
        """Put the copy into the stage; returns how many steps old it is.

        Raises:
          UsageError: it is not allowed, or there is no copy.
        """
        if self._kept is None:
            raise UsageError(f"stage {self._stage} has no older copy to go back to")
        step, state, moments = self._kept
        permit(allow_approximate, way="stale-shard", stage=self._stage, tell=tell, age=now - step)
        self._module.load_state_dict(state)
        self._optimizer.load_state_dict(copy.deepcopy(moments))
        return now - step


@torch.no_grad()
def rebuild_between(
    lost: nn.Module,
    before: nn.Module,
    after: nn.Module,
    *,
    norms: tuple[float, float],
    stage: int,
    allow_approximate: bool,
    tell: Tell,
) -> None:
    """Fill `lost` with the neighbours' mean, weighted with their gradients' squared norms.

    Args:
      lost: the stage to fill; overwritten in place.
      before: the stage before it.
      after: the stage behind it.
      norms: the norm of each neighbour's last gradient. Both 0: an even mean.
      stage: the lost one's number, for messages.
      allow_approximate: whether the user accepts another result.
      tell: writes the event.

    Raises:
      UsageError: it is not allowed, or the three are not of one shape.
    """
    _same_shape(lost, [before, after], stage)
    permit(allow_approximate, way="checkfree", stage=stage, tell=tell, norms=list(norms))
    share = share_of(norms)
    for mine, one, other in zip(
        lost.parameters(), before.parameters(), after.parameters(), strict=True
    ):
        mine.copy_(share * one + (1 - share) * other)


def share_of(norms: tuple[float, float]) -> float:
    """How much of the mean of two neighbours is the first one's; half of it where both norms are 0."""
    left, right = (n * n for n in norms)
    return left / (left + right) if left + right > 0 else 0.5


@torch.no_grad()
def copy_neighbour(
    lost: nn.Module, neighbour: nn.Module, *, stage: int, allow_approximate: bool, tell: Tell
) -> None:
    """Fill `lost` with a neighbour's weights. Raises UsageError as `rebuild_between` does."""
    _same_shape(lost, [neighbour], stage)
    permit(allow_approximate, way="checkfree-copy", stage=stage, tell=tell)
    for mine, one in zip(lost.parameters(), neighbour.parameters(), strict=True):
        mine.copy_(one)


def fresh_optimizer(optimizer: torch.optim.Optimizer, *, lr: float) -> None:
    """Clear the moments, and set the rate to `LR_RAISE` x `lr`, the stage's own from before.

    The raise does not compound: give the rate the job was configured with.
    """
    optimizer.state.clear()
    for group in optimizer.param_groups:
        group["lr"] = LR_RAISE * lr


def _same_shape(lost: nn.Module, others: Sequence[nn.Module], stage: int) -> None:
    shapes = [tuple(p.shape) for p in lost.parameters()]
    if any([tuple(p.shape) for p in other.parameters()] != shapes for other in others):
        raise UsageError(
            f"stage {stage} cannot be made of its neighbours: their parameters differ in shape"
        )
