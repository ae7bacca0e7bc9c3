"""Study: what a block saves for backward, which of it belongs to which tokens, and what it costs.

The block is run a few times, and nothing of it kept: over all tokens, and over some. Where a saved
tensor is shorter the second time, there are its tokens; where its rows have the same bits, they may be
computed again alone.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Literal, TypeAlias

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ftkit.collectives.overlap.offload_plan import BlockCosts, best_fraction, split_at
from ftkit.core.errors import UsageError

Tensor = torch.Tensor
Block: TypeAlias = Callable[..., Tensor]
Fraction: TypeAlias = float | Literal["auto"]

#: A tensor of fewer bytes is not worth a copy: it stays.
SMALL = 1 << 10

#: How far a token's result may be off when it is computed without the others, of the largest.
_ROUNDING = 0.02

_MEET = (
    "tokens computed alone come out otherwise: they meet in this block outside of "
    "scaled_dot_product_attention, or it draws random numbers (dropout); offload a block that does neither"
)


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


Key: TypeAlias = int | tuple[int, int]
"""Of a saved tensor: its number among those outside of attention, or (attention, 0 to 2 of q, k, v)."""


@dataclass(frozen=True, slots=True)
class _Seen:
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
class _Trace:
    """A forward of which nothing is kept but what it would have saved."""

    seen: dict[Key, _Seen] = field(default_factory=dict)
    attention_bytes: int = 0
    """Of what attention saves beside queries, keys and values: it is copied whole."""
    outputs: list[Tensor] = field(default_factory=list)
    """Of each attention."""
    result: Tensor = field(default_factory=lambda: torch.empty(0))
    seconds: float = 0.0


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
class Study:
    """What was found out about a block and a shape of its input."""

    cuts: dict[Key, Cut | None]
    """Of each tensor saved; None: it stays where it is."""
    rows: int
    """Tokens whose activations go to the host."""
    tokens: int
    exact: bool
    """Whether recomputed rows have the same bits."""
    costs: BlockCosts


@dataclass(frozen=True, slots=True, kw_only=True)
class Student:
    """Finds out about blocks."""

    fraction: Fraction
    dim: int
    exact: bool
    host_bytes: int | None
    clock: Callable[[], float]
    rate: Callable[[Tensor], float]
    """Bytes a second to the host, measured with a tensor."""

    def study(self, block: Block, inputs: Sequence[Tensor]) -> Study:
        """Run the block a few times. Blocks."""
        tokens = inputs[0].shape[self.dim]
        if any(x.shape[self.dim] != tokens for x in inputs):
            found = [x.shape[self.dim] for x in inputs]
            raise UsageError(f"inputs have {found} tokens in dimension {self.dim}")
        whole, cuts, recompute_s = self._trace(block, inputs), dict[Key, Cut | None](), 0.0
        if tokens > 1:
            first = split_at(0.5, tokens) or tokens // 2
            part = self._trace(block, self._from(inputs, first), whole.outputs, first)
            outer = inputs[0].shape[: self.dim].numel()
            cuts = _cuts(whole, part, tokens, first, outer)
            _check_rows(whole, part, self.dim, first)
            recompute_s = part.seconds * tokens / (tokens - first)
        costs = self._costs(block, inputs, whole, cuts, recompute_s)
        if self.fraction == "auto":
            fraction = best_fraction(costs, host_bytes=self.host_bytes)
        else:
            fraction = self.fraction
        rows = split_at(fraction, tokens) if cuts else tokens
        exact = rows == tokens or self._same(block, inputs, cuts, rows, bits=True)
        if not exact and not self.exact:
            if not self._same(block, inputs, cuts, rows, bits=False):
                raise UsageError(_MEET)
        elif not exact:
            # All or nothing, then: of whole matrices the bits are the same.
            none = self.fraction == "auto" and costs.added_s(0.0) < costs.added_s(1.0)
            exact = none and self._same(block, inputs, cuts, 0, bits=True)
            rows, exact = (0, True) if exact else (tokens, True)
        return Study(cuts, rows, tokens, exact, costs)

    def _costs(
        self,
        block: Block,
        inputs: Sequence[Tensor],
        whole: _Trace,
        cuts: Mapping[Key, Cut | None],
        recompute_s: float,
    ) -> BlockCosts:
        rate = compute_s = 0.0
        if self.fraction == "auto":
            compute_s = self._trace(block, inputs).seconds  # the first one was to warm up
            rate = self.rate(inputs[0].detach())
        kept = [*inputs, *whole.outputs]
        return BlockCosts(
            tokens=inputs[0].shape[self.dim],
            row_bytes=sum(whole.seen[key].nbytes for key, cut in cuts.items() if cut),
            always_bytes=whole.attention_bytes + sum(nbytes_of(x.shape, x.dtype) for x in kept),
            compute_s=compute_s,
            recompute_s=recompute_s,
            copy_rate=rate,
        )

    def _same(
        self,
        block: Block,
        inputs: Sequence[Tensor],
        cuts: Mapping[Key, Cut | None],
        rows: int,
        *,
        bits: bool,
    ) -> bool:
        """Whether the rows after the first `rows` come out the same alone; to the bit, or about."""
        whole = self._trace(block, inputs, cuts=cuts, marked=rows)
        part = self._trace(block, self._from(inputs, rows), whole.outputs, rows, cuts=cuts)
        for key, seen in whole.seen.items():
            a, b = seen.mark, part.seen[key].mark
            if a is None or b is None:
                continue
            if bits and not (torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])):
                return False
            if not bits and not bool((a[1] - b[1]).abs() <= 1e-3 * a[2]):
                return False
        return True

    def _from(self, inputs: Sequence[Tensor], first: int) -> list[Tensor]:
        found = []
        for x in inputs:
            rows = x.detach().narrow(self.dim, first, x.shape[self.dim] - first)
            found.append(rows.requires_grad_(x.requires_grad))
        return found

    def _trace(
        self,
        block: Block,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor] = (),
        first: int = 0,
        *,
        cuts: Mapping[Key, Cut | None] | None = None,
        marked: int = 0,
    ) -> _Trace:
        """Run the block and keep nothing; with `outputs`, of attention, which is not run then.

        With `cuts`, rows after the first `marked` are marked.
        """
        trace, attending = _Trace(), list[Tensor]()
        given, numbers, attentions = iter(outputs), count(), count()

        def see(key: Key, tensor: Tensor) -> None:
            mark = None
            if cuts is not None and (cut := cuts.get(key)) is not None:
                mark = _mark(cut.rows(tensor.detach(), marked))
            trace.seen[key] = _Seen(tuple(tensor.shape), tensor.stride(), tensor.dtype, mark)

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
            began = self.clock()
            trace.result = block(*given_inputs).detach()
            _synchronize(device)
            trace.seconds = self.clock() - began
        return trace


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


def worth_sending(tensor: Tensor | _Seen) -> bool:
    """Whether it is large enough for the way to the host, and memory of its own."""
    strides = tensor.stride() if isinstance(tensor, Tensor) else tensor.strides
    spread = any(
        stride == 0 and size > 1 for stride, size in zip(strides, tensor.shape, strict=True)
    )
    return nbytes_of(tensor.shape, tensor.dtype) >= SMALL and not spread


def output_rows(output: Tensor, first: int, qkv: Sequence[Tensor]) -> Tensor:
    """The output of attention (..., tokens, width) from a token on, as if it had been computed."""
    rows = output.detach().narrow(-2, first, output.shape[-2] - first)
    return rows.requires_grad_(any(t.requires_grad for t in qkv))


def _mark(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows = rows.contiguous()  # or the sum would be taken in another order
    wide = rows.double().nan_to_num()
    return torch.hash_tensor(rows), wide.sum(), wide.abs().sum()


def _cuts(
    whole: _Trace, part: _Trace, tokens: int, first: int, outer: int
) -> dict[Key, Cut | None]:
    """How each saved tensor is cut: by the dimension that is shorter where there are fewer tokens."""
    if whole.seen.keys() != part.seen.keys():
        raise UsageError(
            f"a block saves {len(whole.seen)} tensors for {tokens} tokens and {len(part.seen)} for "
            f"{tokens - first}: it must do the same however many there are"
        )
    cuts = dict[Key, Cut | None]()
    for key, a in whole.seen.items():
        b = part.seen[key]
        differ = [d for d, (x, y) in enumerate(zip(a.shape, b.shape, strict=False)) if x != y]
        if not differ:
            cuts[key] = None
            continue
        dim = differ[0]
        times = a.shape[dim] // tokens
        if len(differ) > 1 or (a.shape[dim], b.shape[dim]) != (
            times * tokens,
            times * (tokens - first),
        ):
            raise UsageError(
                f"a block saves a tensor of shape {a.shape} for {tokens} tokens and {b.shape} for "
                f"{tokens - first}: where its tokens are cannot be told"
            )
        if isinstance(key, tuple):
            cut = Cut(dim)
        elif times % outer == 0:
            cut = Cut(dim, outer, times // outer)
        else:
            cut = Cut(dim, 1, times)
        cuts[key] = cut if worth_sending(a) else None
    return cuts


def _check_rows(whole: _Trace, part: _Trace, dim: int, first: int) -> None:
    """Raise UsageError unless a token's result does not depend on the others'."""
    rows = whole.result.narrow(dim, first, whole.result.shape[dim] - first)
    wide, alone = rows.double().nan_to_num(), part.result.double().nan_to_num()
    if not bool((wide - alone).abs().max() <= _ROUNDING * wide.abs().max()):
        raise UsageError(_MEET)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def not_kept(_: None) -> Tensor:
    """For tensors that were not saved."""
    raise AssertionError("nothing goes backward through a trace")
