"""Trace: what a block saves for backward, seen without keeping it.

Attention is seen apart, as its tokens meet: what it saves is told from the rest, and its result may be
given in its place.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, TypeAlias

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.overrides import TorchFunctionMode

Tensor = torch.Tensor
Block: TypeAlias = Callable[..., Tensor]

#: A tensor of fewer bytes is not worth a copy: it stays.
SMALL = 1 << 10

Key: TypeAlias = int | tuple[int, int]
"""Of a saved tensor: its number among those outside of attention, or (attention, 0 to 2 of q, k, v)."""


@dataclass(frozen=True, slots=True)
class Cut:
    """How one saved tensor is cut by tokens: `dim` is (outer, tokens, inner), flattened."""

    dim: int
    outer: int = 1
    inner: int = 1

    def rows(self, tensor: Tensor, start: int, end: int | None = None) -> Tensor:
        """A view of the rows of some tokens; up to the last without an `end`."""
        if self.outer * self.inner > 1:
            shape = self.outer, -1, self.inner
            tensor = tensor.unflatten(self.dim, shape)  # type: ignore[no-untyped-call]
        dim = self.dim + (self.outer * self.inner > 1)
        end = tensor.shape[dim] if end is None else end
        return tensor.narrow(dim, start, end - start)


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """A tensor that was saved, in one trace of a block."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    mark: "tuple[Tensor, Tensor, Tensor] | None"
    """Of the rows asked for: a hash of their bits, their sum, and that of what they are in size."""

    @property
    def nbytes(self) -> int:
        return nbytes_of(self.shape, self.dtype)


@dataclass(slots=True)
class BlockTrace:
    """A forward of which nothing is kept but what it would have saved."""

    seen: dict[Key, SavedTensor] = field(default_factory=dict)
    attention_bytes: int = 0
    """Of what attention saves beside queries, keys and values: it is copied whole."""
    outputs: list[Tensor] = field(default_factory=list)
    """Of each attention."""
    result: Tensor = field(default_factory=lambda: torch.empty(0))
    seconds: float = 0.0


def trace_block(
    block: Block,
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor] = (),
    first: int = 0,
    *,
    clock: Callable[[], float],
    cuts: Mapping[Key, Cut | None] | None = None,
    marked: int = 0,
) -> BlockTrace:
    """Run `block` and keep nothing of it. Blocks.

    Args:
      block: what to run.
      inputs: its tokens; from `first` on where there are `outputs`.
      outputs: of each attention over all tokens: attention is not run then.
      first: the first of the tokens.
      clock: seconds.
      cuts: mark what is cut, from row `marked` on.
      marked: see `cuts`.
    """
    trace, attending = BlockTrace(), list[Tensor]()
    given, numbers, attentions = iter(outputs), count(), count()

    def see(key: Key, tensor: Tensor) -> None:
        mark = None
        if cuts is not None and (cut := cuts.get(key)) is not None:
            mark = _mark(cut.rows(tensor.detach(), marked))
        trace.seen[key] = SavedTensor(tuple(tensor.shape), tensor.stride(), tensor.dtype, mark)

    def pack(tensor: Tensor) -> None:
        if not attending:
            see(next(numbers), tensor)
        elif not any(same_memory(tensor, t) for t in attending):
            trace.attention_bytes += nbytes_of(tensor.shape, tensor.dtype)

    def attend(run: Callable[[], Tensor], qkv: Sequence[Tensor]) -> Tensor:
        number = next(attentions)
        for i, tensor in enumerate(qkv):
            see((number, i), tensor)
        if outputs:
            return output_rows(next(given), first, qkv)
        attending.extend(qkv)
        try:
            out = run()
        finally:
            attending.clear()
        trace.outputs.append(out.detach())
        return out

    given_inputs = [x.detach().requires_grad_(x.requires_grad) for x in inputs]
    device = inputs[0].device
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        saved_tensors_hooks(pack, not_kept),
        AttentionSeen(attend),
    ):
        _synchronize(device)
        began = clock()
        trace.result = block(*given_inputs).detach()
        _synchronize(device)
        trace.seconds = clock() - began
    return trace


class AttentionSeen(TorchFunctionMode):
    """Tells of every `scaled_dot_product_attention` in a block, and may answer in its place."""

    def __init__(self, attend: Callable[[Callable[[], Tensor], Sequence[Any]], Tensor]) -> None:
        super().__init__()
        self._attend = attend

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        names = ("query", "key", "value")
        qkv = [args[i] if i < len(args) else kwargs[name] for i, name in enumerate(names)]
        return self._attend(lambda: func(*args, **kwargs), qkv)


def same_memory(tensor: Tensor, other: Tensor) -> bool:
    """Whether both are the same memory, seen the same way."""
    return (
        tensor.data_ptr() == other.data_ptr()
        and tensor.shape == other.shape
        and tensor.stride() == other.stride()
    )


def nbytes_of(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes of such a tensor."""
    return math.prod(shape) * dtype.itemsize


def worth_sending(tensor: Tensor | SavedTensor) -> bool:
    """Whether it is large enough for the way to the host, and memory of its own."""
    strides = tensor.stride() if isinstance(tensor, Tensor) else tensor.strides
    spread = any(
        stride == 0 and size > 1 for stride, size in zip(strides, tensor.shape, strict=True)
    )
    return nbytes_of(tensor.shape, tensor.dtype) >= SMALL and not spread


def input_rows(x: Tensor, dim: int, first: int, *, grad: bool) -> Tensor:
    """An input's tokens from `first` on, packed as all of them are: a linear layer goes by that."""
    rows = x.detach().narrow(dim, first, x.shape[dim] - first)
    rows = rows.contiguous() if x.is_contiguous() else rows
    return rows.detach().requires_grad_(grad)


def output_rows(output: Tensor, first: int, qkv: Sequence[Tensor]) -> Tensor:
    """The output of attention (..., tokens, width) from a token on, as if it had been computed."""
    rows = output.detach().narrow(-2, first, output.shape[-2] - first)
    return rows.requires_grad_(any(t.requires_grad for t in qkv))


def not_kept(_: None) -> Tensor:
    """For tensors that were not saved."""
    raise AssertionError("nothing goes backward through a trace")


def _mark(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows = rows.contiguous()  # or the sum would be taken in another order
    wide = rows.double().nan_to_num()
    return torch.hash_tensor(rows), wide.sum(), wide.abs().sum()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
