"""LazyState: a state dict whose tensors are read one at a time, when they are asked for.

What converters pass on: a checkpoint larger than memory goes through, tensor by tensor.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from ftkit.checkpoint.ecosystem.skeleton import taken
from ftkit.checkpoint.layout import ITEM_BYTES
from ftkit.checkpoint.plain import encode
from ftkit.checkpoint.walk import dtype_name
from ftkit.core.errors import UsageError


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """A tensor that has not been read."""

    dtype: str
    """As layouts spell it."""
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]
    """Reads it, whole, checked as well as its format allows. The tensor is the caller's to read,
    not to change: it may be a map of the file. Blocks; raises IntegrityError for damage."""

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.dtype]

    @property
    def torch_dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    def placeholder(self) -> torch.Tensor:
        """A tensor of its kind without memory."""
        return torch.empty(self.shape, dtype=self.torch_dtype, device="meta")


@dataclass(frozen=True, slots=True)
class LazyState:
    """A state dict: its skeleton, and its tensors by name."""

    skeleton: dict[str, Any]
    tensors: Mapping[str, LazyTensor]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())

    def part(self, name: str) -> "LazyState":
        """One part of it by itself. UsageError when there is none of that name."""
        skeleton, before = taken(self.skeleton, name)
        return LazyState(skeleton, {new: self.tensors[old] for new, old in before.items()})

    @classmethod
    def of(cls, state: object, what: str) -> "LazyState":
        """A state dict that is at hand, in memory or mapped into it.

        Args:
          state: a dict with text keys.
          what: names it in errors.

        Raises:
          UsageError: it is no such dict, holds what is no plain value, or two tensors in it
            come to the same name. The message names the key.
        """
        skeleton, tensors = flatten(state, what)

        def lazy(tensor: torch.Tensor) -> LazyTensor:
            return LazyTensor(dtype_name(tensor), tuple(tensor.shape), lambda: tensor)

        return cls(skeleton, {name: lazy(tensor) for name, tensor in tensors.items()})


class _Once(dict[str, torch.Tensor]):
    """Tensors by name, which refuses a name that is taken."""

    def __setitem__(self, name: str, tensor: torch.Tensor) -> None:
        if name in self:
            raise UsageError(
                f"two tensors come to the name {name!r}: a key has '/' in it, or keys differ in "
                "type alone. Rename one"
            )
        super().__setitem__(name, tensor)


def flatten(state: object, what: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The skeleton and the tensors of a state dict. Raises as `LazyState.of`."""
    if not isinstance(state, Mapping):
        raise UsageError(f"{what} holds a {type(state).__name__}, not a state dict")
    odd = [key for key in state if not isinstance(key, str) or key.startswith("$")]
    if odd:
        raise UsageError(f"{what} has the top-level key {odd[0]!r}; keys must be text, without $")
    tensors = _Once()
    skeleton = {key: encode(value, key, tensors) for key, value in state.items()}
    for name, tensor in tensors.items():
        check_storable(name, tensor)
    return skeleton, tensors


def check_storable(name: str, tensor: torch.Tensor) -> None:
    """UsageError unless a tensor is dense and of a dtype that checkpoints know."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
        raise UsageError(f"{name} is {tensor.layout}; only dense tensors can be stored")
    if dtype_name(tensor) not in ITEM_BYTES:
        raise UsageError(f"{name} has dtype {tensor.dtype}, which cannot be stored")


def memory_of(tensor: torch.Tensor) -> memoryview:
    """A tensor's elements in C order, as bytes.

    Its own memory, kept alive by the view, where that is one run on the CPU; else a copy.
    """
    host = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    return host.view(torch.uint8).numpy().data if host.numel() else memoryview(bytearray())
