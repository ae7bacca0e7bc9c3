"""Watch: notice cheaply that the tensors found by the last walk still are the live ones.

Walking a model by name takes milliseconds and happens in the training thread at every step;
comparing identities and addresses takes tenths of one.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ftkit.checkpoint.shards import is_dtensor, local_of


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
        self._contents = list(self._found())
        self._identities = list(map(id, self._contents))
        self._tensors = tensors
        self._addresses = [t.data_ptr() for t in tensors]
        # A DTensor may get another local tensor and stay the same object (FSDP2 does that).
        self._sharded: list[Any] = [t for t in self._contents if is_dtensor(t)]
        self._shard_addresses = [local_of(t).data_ptr() for t in self._sharded]

    def holds(self) -> bool:
        """Whether nothing was added, removed, replaced or moved since.

        Sizes are not looked at, which would cost as much again: a tensor that grows moves.
        """
        return (
            list(map(id, self._found())) == self._identities
            and list(map(torch.Tensor.data_ptr, self._tensors)) == self._addresses
            and [t._local_tensor.data_ptr() for t in self._sharded] == self._shard_addresses
        )

    def _found(self) -> Iterator[Any]:
        """Every object the containers refer to now, always in the same order."""
        return chain.from_iterable(held.values() for held in self._containers())

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
