"""StepBuffers: module buffers that forward passes change, made part of the transaction.

BatchNorm's running statistics and their like are changed by every forward pass, in the order
of slots, so they would depend on which rank played which slot and could not be played again.
Here every slot begins with the buffers of the step's beginning, and the step ends with what
slot 0 made of them, on all ranks: as in plain DDP, where rank 0's buffers count.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch


@dataclass(slots=True)
class _Place:
    """Where a buffer is registered. Modules may put another tensor there at any forward pass."""

    module: torch.nn.Module
    name: str
    tensor: torch.Tensor
    """The tensor that is there between steps."""
    before: torch.Tensor

    def now(self) -> torch.Tensor:
        """The tensor that is there now, or the one from the step's beginning."""
        found = self.module._buffers.get(self.name)
        return self.tensor if found is None else found

    def put(self, value: torch.Tensor) -> None:
        """Have the original tensor there, holding `value`."""
        self.tensor.detach().copy_(value)
        if self.module._buffers.get(self.name) is not self.tensor:
            self.module._buffers[self.name] = self.tensor


class StepBuffers:
    """The buffers of the protected modules, at the beginning of a step and after slot 0."""

    def __init__(self, modules: Iterable[torch.nn.Module]) -> None:
        """Remember every buffer that is not empty, with a copy of its value."""
        self._places = [
            _Place(module, name, buffer, buffer.detach().clone())
            for root in modules
            for module in root.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and buffer.numel()
        ]
        self._after_first: list[torch.Tensor] = []

    def rewind(self) -> None:
        """Back to the beginning of the step: before each slot, and when it is rolled back."""
        for place in self._places:
            place.put(place.before)

    def keep(self) -> None:
        """The first slot of the global batch has been played here: its result counts."""
        self._after_first = [place.now().detach().clone() for place in self._places]

    @property
    def changed(self) -> bool:
        """Whether slot 0 was played here and made something else of a buffer."""
        pairs = zip(self._places, self._after_first, strict=False)
        return any(not torch.equal(place.before, after) for place, after in pairs)

    @property
    def after_first(self) -> list[torch.Tensor]:
        """What slot 0 made of the buffers, if it was played here; for `resume`."""
        return self._after_first

    def resume(self, after_first: list[torch.Tensor]) -> None:
        """Slot 0 was played here in an attempt before, and counts."""
        self._after_first = after_first

    def share(self, broadcast: Callable[[torch.Tensor], None]) -> None:
        """Let every rank have what slot 0 made of the buffers.

        Args:
          broadcast: gives all ranks the tensor of the one that played slot 0, in place.
        """
        for i, place in enumerate(self._places):
            place.put(self._after_first[i] if self._after_first else place.before)
            broadcast(place.tensor.detach())
