"""Watch: notice cheaply that the tensors found by the last walk still are the live ones.

Walking a model by name takes milliseconds and happens in the training thread at every step;
comparing identities and addresses takes tenths of one.
"""

from collections.abc import Iterable, Sequence
from operator import is_
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer


class Watch:
    """Remembers which objects sit where, and at which addresses their tensors lie.

    It keeps those objects alive, so an identity is never reused while it is compared.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        optimizers: Iterable[Optimizer],
        tensors: Sequence[torch.Tensor],
    ) -> None:
        """Remember what is true now; `tensors` are those found in the modules and optimizers."""
        self._optimizers = list(optimizers)
        self._fixed: list[dict[Any, Any]] = []
        for root in modules:
            for module in root.modules():
                self._fixed += [module._parameters, module._buffers, module._modules]
        self._contents = [tuple(held.values()) for held in self._containers()]
        self._tensors = tensors
        self._addresses = [t.data_ptr() for t in tensors]
        self._sizes = [t.shape for t in tensors]

    def holds(self) -> bool:
        """Whether nothing was added, removed, replaced, moved or resized since."""
        containers = self._containers()
        return (
            len(containers) == len(self._contents)
            and all(
                len(held) == len(before) and all(map(is_, held.values(), before))
                for held, before in zip(containers, self._contents, strict=True)
            )
            and [t.data_ptr() for t in self._tensors] == self._addresses
            and [t.shape for t in self._tensors] == self._sizes
        )

    def _containers(self) -> list[dict[Any, Any]]:
        """Everything that refers to live tensors, always in the same order.

        Optimizer state that is no tensor (a count that changes) never compares as unchanged,
        and so costs a walk each time: rare, and right.
        """
        found = list(self._fixed)
        for optimizer in self._optimizers:
            found.append(dict(enumerate(optimizer.param_groups)))
            found += [dict(enumerate(group["params"])) for group in optimizer.param_groups]
            found.append(optimizer.state)
            found += optimizer.state.values()
        return found
