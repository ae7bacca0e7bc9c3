"""Homes: where the bytes of a result go, for tensors that are not contiguous too."""

from collections.abc import Sequence
from typing import Any

import torch

from ftkit.collectives import checks
from ftkit.collectives.arithmetic import Bytes, as_bytes
from ftkit.collectives.handle import Handle


class Home:
    """A tensor's bytes to write to; when it is not contiguous, those of a copy."""

    def __init__(self, tensor: torch.Tensor) -> None:
        checks.writable(tensor)
        self._tensor = tensor
        self._dense = tensor if tensor.is_contiguous() else tensor.contiguous()
        self.data = as_bytes(self._dense)

    @property
    def away(self) -> bool:
        """Whether the bytes are a copy's."""
        return self._dense is not self._tensor

    def restore(self) -> None:
        """Bring the copy home."""
        if self.away:
            with torch.no_grad():
                self._tensor.copy_(self._dense)


def restored(homes: Sequence[Home], handle: Handle[Any]) -> Handle[Any]:
    """`handle`, after which the tensors themselves hold the result."""
    if not any(home.away for home in homes):
        return handle

    def restore(value: Any) -> Any:
        for home in homes:
            home.restore()
        return value

    return handle.then(restore)


def source(tensor: torch.Tensor) -> Bytes:
    """A tensor's bytes to read from; a copy's, when it is not contiguous."""
    checks.dense(tensor)
    return as_bytes(tensor.contiguous())
