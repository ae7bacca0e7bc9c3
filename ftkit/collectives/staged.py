"""StageReducer: the gradients of one pipeline stage, which no other rank has a part of.

Each stage plays every slot of the global batch, in the order of slots, and autograd adds their
gradients up in `.grad`, one after another. That order is the schedule's, whatever the cut, so the
bits of the sum do not depend on which stage holds a layer. What is left to do is to look at the sum
and to divide it.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
import xxhash
from torch import nn

from ftkit.collectives.gradients import norm_of
from ftkit.core.errors import UsageError


class StageReducer:
    """Owns `.grad` of one stage's parameters during a step. One thread, the training thread."""

    def __init__(self, modules: Sequence[nn.Module], *, slots: int, mean: bool = True) -> None:
        """Take note of every parameter that is trained.

        Args:
          modules: the layers of this stage.
          slots: slots of the global batch.
          mean: whether the sum is divided by `slots`.
        """
        unique = {id(p): p for m in modules for p in m.parameters() if p.requires_grad}
        self._params = list(unique.values())
        self._scale = 1.0 / slots if mean else 1.0
        self.buckets = 1
        self.look_at: Callable[[int, int, torch.Tensor], None] | None = None
        """Not called: the gradients of a slot are never apart from the others'."""

    @property
    def ids(self) -> set[int]:
        """`id` of every parameter."""
        return {id(p) for p in self._params}

    @property
    def norms(self) -> list[float]:
        """Whether the gradients are finite, as a norm: 1, or NaN.

        Stages hold other layers, whose norms are not to be compared.
        """
        sums = (norm_of(p.grad).item() for p in self._params if p.grad is not None)
        return [1.0 if all(map(math.isfinite, sums)) else math.nan]

    @property
    def grad_norm(self) -> float:
        """Of the gradients of the whole stage. Reads them once."""
        return math.hypot(*(norm_of(p.grad).item() for p in self._params if p.grad is not None))

    def parts_of(
        self, bucket: int, values: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The parameters, each with the gradients of them all."""
        for param in self._params:
            yield param, values

    def drop(self) -> None:
        """Take `.grad` away from all parameters."""
        for param in self._params:
            param.grad = None

    def begin(self) -> None:
        """A new attempt: forget whatever an earlier one left."""
        self.drop()

    def start_slot(self, slot: int, *, last: bool, weight: int = 1) -> None:
        """Slots overlap in a pipeline: nothing begins here."""

    def end_slot(self) -> None:
        """Nor ends."""

    def finish(self, *, held: int) -> int:
        """Divide the sums. Returns a 64-bit digest of them.

        Raises:
          UsageError: no slot has been played.
        """
        if self._params and all(p.grad is None for p in self._params):
            raise UsageError(
                "the stage has no gradients: run the schedule over all of step.slots() before the "
                "optimizer steps"
            )
        digest = xxhash.xxh3_64()
        for param in self._params:
            if param.grad is not None:
                param.grad.mul_(self._scale)
                flat = param.grad.detach().cpu().contiguous().reshape(-1)
                digest.update(flat.view(torch.uint8).numpy().data)
        return digest.intdigest()

    def end(self) -> None:
        """The step is over."""

    def close(self) -> None:
        """Nothing is kept."""
