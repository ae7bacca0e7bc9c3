"""Linear layers split over ranks, whose communication hides behind their own multiplication.

    linear_reduce_scatter   x (R, ..., K/n) @ w.T (K/n, N)  -> our rows of the sum   row parallel
    all_gather_linear       our rows of x (R, ..., K), all of them @ w.T (K, N/n)    column parallel
    linear_all_reduce       the same sum on all ranks       row parallel, nothing scattered
    linear_replicated       x on all ranks @ w.T (K, N/n)   column parallel, nothing gathered

Forward and backward; a row-parallel backward is a column-parallel forward and the other way
round, so both overlap. The sums are those of the unsplit layer but for the order of adding.
On CUDA the first two go to torch's fused operators over symmetric memory, in even parts, and the
first has no backward there.

Blocking. A fault in the middle ends the call on all ranks with GenerationAborted, inputs and
parameters as they were; inside `with step:` the step is played again.
"""

# autograd.Function has no types.
# mypy: disable-error-code="override,no-untyped-call"

import math
from typing import Any, cast

import torch
from torch.nn import functional

from ftkit.collectives.overlap import cuda, exchange
from ftkit.collectives.overlap.auto import Chunks, running
from ftkit.collectives.overlap.autograd import as_autocast, once, uncompiled
from ftkit.collectives.overlap.flights import of
from ftkit.collectives.overlap.parts import bounds
from ftkit.core.errors import UsageError

Tensor = torch.Tensor


@uncompiled
def linear_reduce_scatter(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    group: Any = None,
    dim: int = 0,
    chunks: Chunks = "auto",
) -> Tensor:
    """Row-parallel linear: multiply, sum over ranks, keep our part of dimension `dim`.

    Args:
      x: shape (..., K/n): our columns of the input.
      weight: shape (N, K/n): our columns of the weight.
      bias: shape (N,), the same on all ranks; added once.
      group: the ranks; None for the default group.
      dim: what is scattered, not the last one; cut as `torch.chunk` does, so that the last ranks
        may have less, or nothing.
      chunks: messages to each rank; "auto" measures the first calls of each shape, and does not
        overlap where that does not pay.

    Returns:
      shape (..., N), with our part of `dim`. Each rank sends (n-1)/n of the whole.

    Raises:
      GenerationAborted: the ranks of the group are not what they were; nothing was changed.
    """
    return cast(
        "Tensor", _ReduceScatter.apply(*as_autocast(x, weight, bias), of(group), dim, chunks)
    )


@uncompiled
def all_gather_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    group: Any = None,
    dim: int = 0,
    rows: int | None = None,
    chunks: Chunks = "auto",
) -> Tensor:
    """Column-parallel linear: multiply everybody's rows as they come; as `linear_reduce_scatter`.

    Args:
      x: shape (..., K), our part of dimension `dim`.
      weight: shape (N/n, K).
      bias: shape (N/n,): ours.
      group: the ranks.
      dim: what is gathered, not the last one.
      rows: of the whole in `dim`; None where all ranks have as many. Where they have not, and it is
        left out, the call ends on all ranks with GenerationAborted.
      chunks: messages from each rank.

    Returns:
      shape (..., N/n), whole in `dim`. The gathered input is kept for backward.
    """
    group = of(group)
    total = x.shape[dim] * int(group.size()) if rows is None else rows
    return cast(
        "Tensor", _AllGather.apply(*as_autocast(x, weight, bias), group, dim, total, chunks)
    )


@uncompiled
def linear_all_reduce(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    group: Any = None,
    chunks: Chunks = "auto",
) -> Tensor:
    """Row-parallel linear whose sum all ranks get: as `linear_reduce_scatter`, for the whole.

    A chunk of rows is all-reduced while the next is multiplied. Backward sends nothing: the
    gradient that comes in is the same on all ranks.
    """
    return cast("Tensor", _AllReduce.apply(*as_autocast(x, weight, bias), of(group), chunks))


@uncompiled
def linear_replicated(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    group: Any = None,
    chunks: Chunks = "auto",
) -> Tensor:
    """Column-parallel linear of an input that all ranks have.

    Forward sends nothing. In backward the gradient of the input is all-reduced a chunk of rows at
    a time, and that of the weight computed meanwhile.
    """
    return cast("Tensor", _Replicated.apply(*as_autocast(x, weight, bias), of(group), chunks))


def times(a: Tensor, b: Tensor) -> Tensor:
    """A (M, K) @ b (K, N), new and contiguous."""
    return a @ b


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, group: Any, dim: int, chunks: Any
    ) -> Tensor:
        ctx.group, ctx.dim, ctx.chunks = group, dim, chunks
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        if cuda.serves(x, group):
            if any(ctx.needs_input_grad):
                raise UsageError(
                    "a row-parallel linear has no backward on CUDA: over NCCL its sends and receives "
                    "would wait for each other; use torch's own tensor parallelism, or torch.no_grad()"
                )
            out = cuda.matmul_reduce_scatter(x, weight, dim, group)
        else:
            flat, unit = _flat(x, dim)
            shapes = _shared(flat.shape[0], weight.shape[0], unit, x)
            with running(group, "linear_reduce_scatter", chunks, *shapes) as run:
                made = exchange.scatter(
                    run.flights,
                    lambda a, b: times(flat[a:b], weight.t()),
                    (flat.shape[0], weight.shape[0]),
                    unit=unit,
                    chunks=run.cut.chunks,
                    eager=run.cut.eager,
                    like=x,
                )
            out = _folded(made, x, dim)
        return out if bias is None else out + bias

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        flat, unit = _flat(x, ctx.dim)
        mine, _ = _flat(grad, ctx.dim)
        of_x = torch.empty_like(flat)
        shapes = _shared(flat.shape[0], weight.shape[0], unit, x)
        bias: Tensor | None = None
        ours, of_weight = mine.contiguous(), list[Tensor]()
        # Of our own rows first, while others travel. In half precision that would round once more.
        apart = ctx.needs_input_grad[1] and flat.dtype not in exchange.HALVES
        with running(
            ctx.group, "linear_reduce_scatter backward", ctx.chunks, *shapes, gathers=True
        ) as run:

            def consume(a: int, b: int, rows: Tensor) -> None:
                of_x[a:b] = times(rows, weight)
                if rows is ours and apart:
                    of_weight.append(times(rows.t(), flat[a:b]))

            whole = exchange.gather(
                run.flights,
                ours,
                flat.shape[0],
                consume,
                unit=unit,
                chunks=run.cut.chunks,
                eager=run.cut.eager,
            )
            if ctx.has_bias:
                bias = whole.sum(0)
        total: Tensor | None = None
        if of_weight:
            (total,) = of_weight
            start, end = exchange.rows_of(ctx.group, flat.shape[0], unit)
            for rest in (slice(0, start), slice(end, None)):
                total.addmm_(whole[rest].t(), flat[rest])
        elif ctx.needs_input_grad[1]:
            total = times(whole.t(), flat)
        return _folded(of_x, x, ctx.dim), total, bias, None, None, None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        group: Any,
        dim: int,
        rows: int,
        chunks: Any,
    ) -> Tensor:
        ctx.group, ctx.dim, ctx.chunks = group, dim, chunks
        ctx.has_bias = bias is not None
        mine, unit = _flat(x, dim)
        if cuda.serves(x, group):
            cuda.even(rows, group)
            whole, out = cuda.all_gather_matmul(mine, weight, group)
        else:
            out = x.new_empty(rows * unit, weight.shape[0])
            shapes = _shared(rows * unit, mine.shape[1], unit, x)
            with running(group, "all_gather_linear", chunks, *shapes, gathers=True) as run:

                def consume(a: int, b: int, came: Tensor) -> None:
                    out[a:b] = times(came, weight.t())

                whole = exchange.gather(
                    run.flights,
                    mine.contiguous(),
                    rows * unit,
                    consume,
                    unit=unit,
                    chunks=run.cut.chunks,
                    eager=run.cut.eager,
                )
        ctx.save_for_backward(whole, weight)
        ctx.unit, ctx.shape = unit, x.shape
        if bias is not None:
            out += bias
        return _folded(out, x, dim)

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        whole, weight = ctx.saved_tensors
        flat, unit = _flat(grad, ctx.dim)
        of_weight: list[Tensor] = []
        if cuda.serves(grad, ctx.group):
            of_x = cuda.matmul_reduce_scatter(flat, weight.t(), 0, ctx.group)
            of_weight.append(times(flat.t(), whole))
        else:
            name = "all_gather_linear backward"
            shapes = _shared(flat.shape[0], weight.shape[1], unit, grad)
            with running(ctx.group, name, ctx.chunks, *shapes) as run:
                of_x = exchange.scatter(
                    run.flights,
                    lambda a, b: times(flat[a:b], weight),
                    (flat.shape[0], weight.shape[1]),
                    unit=unit,
                    chunks=run.cut.chunks,
                    eager=run.cut.eager,
                    like=grad,
                    meanwhile=lambda: of_weight.append(times(flat.t(), whole)),
                )
        bias = flat.sum(0) if ctx.has_bias else None
        return _folded(of_x, grad, ctx.dim), of_weight[0], bias, None, None, None, None


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, group: Any, chunks: Any
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        flat = _rows(x)
        shapes = _shared(flat.shape[0], weight.shape[0], 1, x)
        with running(group, "linear_all_reduce", chunks, *shapes) as run:
            out = exchange.reduce(
                run.flights,
                lambda a, b: times(flat[a:b], weight.t()),
                flat.shape[0],
                chunks=run.cut.chunks,
                eager=run.cut.eager,
            )
        out = out.view(*x.shape[:-1], weight.shape[0])
        return out if bias is None else out + bias

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        flat = _rows(grad)
        bias = flat.sum(0) if ctx.has_bias else None
        of_weight = times(flat.t(), _rows(x))
        return grad @ weight, of_weight, bias, None, None


class _Replicated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, group: Any, chunks: Any
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.group, ctx.chunks, ctx.has_bias = group, chunks, bias is not None
        return functional.linear(x, weight, bias)

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        flat = _rows(grad)
        of_weight: list[Tensor] = []
        name = "linear_replicated backward"
        shapes = _shared(flat.shape[0], weight.shape[1], 1, grad)
        with running(ctx.group, name, ctx.chunks, *shapes) as run:
            of_x = exchange.reduce(
                run.flights,
                lambda a, b: times(flat[a:b], weight),
                flat.shape[0],
                chunks=run.cut.chunks,
                eager=run.cut.eager,
                meanwhile=lambda: of_weight.append(times(flat.t(), _rows(x))),
            )
        bias = flat.sum(0) if ctx.has_bias else None
        return of_x.view(x.shape), of_weight[0], bias, None, None


def _shared(rows: int, width: int, unit: int, like: Tensor) -> tuple[object, ...]:
    """What the tuner of a call is found by: what travels, the same on all ranks.

    Ranks have parts of different sizes, and two layers whose parts are alike on one rank may differ
    on another. With their own sizes in it, ranks would count calls differently, and hang.
    """
    return rows, width, unit, like.dtype


def _rows(x: Tensor) -> Tensor:
    """All but the last dimension as one; of a single token, too, which has no other."""
    return cast("Tensor", torch.atleast_2d(x)).flatten(0, -2)


def _flat(x: Tensor, dim: int) -> tuple[Tensor, int]:
    """`x` as rows, those of one index of `dim` together, and how many they are."""
    if not 0 <= dim < x.ndim - 1:
        raise ValueError(f"dim must be one of the first {x.ndim - 1} dimensions, got {dim}")
    moved = x.movedim(dim, 0)
    unit = math.prod(moved.shape[1:-1])
    return moved.reshape(moved.shape[0] * unit, x.shape[-1]), unit


def _folded(rows: Tensor, like: Tensor, dim: int) -> Tensor:
    """The inverse: rows in the shape of `like`, but for `dim` and the last dimension."""
    rest = [*like.shape[:dim], *like.shape[dim + 1 : -1]]
    count = rows.shape[0] // max(1, math.prod(rest))
    return rows.view(count, *rest, rows.shape[-1]).movedim(0, dim)


def own_rows(rows: int, group: Any = None) -> tuple[int, int]:
    """The part of a dimension of `rows` that this rank has: start and end."""
    group = of(group)
    return bounds(rows, int(group.size()), int(group.rank()))
