"""StepBuffers: module buffers that forward passes change, made part of the transaction.

BatchNorm's running statistics and their like are changed by every forward pass, in the order
of slots, so they would depend on which rank played which slot and could not be played again.
Here every slot begins with the buffers of the step's beginning, and the step ends with what
slot 0 made of them, on all ranks: as in plain DDP, where rank 0's buffers count.
"""

from collections.abc import Callable, Iterable

import torch


class StepBuffers:
    """The buffers of the protected modules, at the beginning of a step and after slot 0."""

    def __init__(self, modules: Iterable[torch.nn.Module]) -> None:
        """Remember every buffer that is not empty, with a copy of its value."""
        self._live = [b.detach() for m in modules for b in m.buffers() if b.numel()]
        self._before = [b.clone() for b in self._live]
        self._after_first: list[torch.Tensor] = []

    def rewind(self) -> None:
        """Back to the beginning of the step: before each slot, and when it is rolled back."""
        for live, before in zip(self._live, self._before, strict=True):
            live.copy_(before)

    def keep(self) -> None:
        """The first slot of the global batch has been played here: its result counts."""
        self._after_first = [b.clone() for b in self._live]

    def share(self, broadcast: Callable[[torch.Tensor], None]) -> None:
        """Let every rank have what slot 0 made of the buffers.

        Args:
          broadcast: gives all ranks the tensor of the one that played slot 0, in place.
        """
        for live, kept in zip(self._live, self._after_first or self._live, strict=True):
            live.copy_(kept)
            broadcast(live)
