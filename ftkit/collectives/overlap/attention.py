"""Context-parallel attention: each rank has some tokens, and its queries see all keys.

Exact, forward and backward, causal with zigzag balance, with grouped heads. What goes round, and
in which direction, is chosen by its bytes (`routes`), for forward and backward apart.
"""

# autograd.Function has no types.
# mypy: disable-error-code="override,no-untyped-call"

import math
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, cast

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ftkit.collectives.overlap.attend import check, sum_dtype
from ftkit.collectives.overlap.autograd import as_autocast, once, uncompiled
from ftkit.collectives.overlap.flights import Flights, of
from ftkit.collectives.overlap.ring_backward import backward
from ftkit.collectives.overlap.ring_forward import Plan, forward
from ftkit.collectives.overlap.routes import Rotate, Shapes, cheapest
from ftkit.collectives.overlap.sequence import Layout
from ftkit.core.errors import UsageError

Tensor = torch.Tensor
Route: TypeAlias = Rotate | Literal["auto", "kv", "bidirectional", "query", "allgather"]


@uncompiled
def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: Any = None,
    is_causal: bool = False,
    scale: float | None = None,
    rotate: Route = "auto",
    mesh: bool = False,
    layout: Layout | None = None,
    kv_layout: Layout | None = None,
) -> Tensor:
    """Attention of this rank's queries over the keys and values of all. Blocks.

    Args:
      q: shape (B, Hq, S, D): the queries of our tokens.
      k: shape (B, Hkv, S, D), where Hkv divides Hq.
      v: as `k`.
      group: the ranks; None for the default group.
      is_causal: whether a query sees only keys that are not after it. Then `k` and `v` are of the
        same tokens as `q`.
      scale: of the scores; 1/sqrt(D) by default.
      rotate: what goes round; "auto" takes what costs the busiest direction least.
      mesh: whether every two ranks have a wire of their own (NVLink within a host), the same on all
        ranks. "auto" then considers the all-gather, which holds keys and values of all ranks at once.
      layout: who holds which tokens; by default all ranks as many, in zigzag order if causal, which
        ranks make sure of with one small all-reduce a call.
      kv_layout: of `k` and `v`, where it is another.

    Returns:
      shape (B, Hq, S, D), in the dtype of `q`.

    Raises:
      GenerationAborted: the ranks of the group are not what they were.
      UsageError: shapes that do not fit each other, or the layout.
    """
    group = of(group)
    q, k, v = as_autocast(q, k, v)
    check(q, k, v)
    size, rank = int(group.size()), int(group.rank())
    if layout is None:
        _same_lengths(group, q.shape[2], 0 if kv_layout else k.shape[2])
    queries = layout or Layout(q.shape[2] * size, size, zigzag=is_causal)
    same = queries if layout is not None or is_causal else Layout(k.shape[2] * size, size)
    keys = kv_layout or same
    if is_causal and keys != queries:
        raise UsageError("under a causal mask queries and keys are of the same tokens")
    for name, tensor, wanted in (("q", q, queries), ("k", k, keys)):
        if wanted.size != size or tensor.shape[2] != wanted.tokens(rank):
            raise UsageError(
                f"{name} has {tensor.shape[2]} tokens, and {wanted} gives rank {rank} of {size} "
                f"{wanted.tokens(rank)}; pass the layout by which they were divided"
            )
    plan = Plan(
        queries=queries,
        keys=keys,
        causal=is_causal,
        scale=1 / math.sqrt(q.shape[3]) if scale is None else scale,
    )
    routes = [
        cheapest(shapes_of(q, k, plan, mesh=mesh), backward=back)
        if rotate == "auto"
        else Rotate(rotate)
        for back in (False, True)
    ]
    return cast("Tensor", _Attention.apply(q, k, v, group, plan, *routes))


def _same_lengths(group: Any, queries: int, keys: int) -> None:
    """Raise UsageError, on all ranks, unless all have as many tokens. Blocks."""
    size = int(group.size())
    found = torch.zeros(size, 2, dtype=torch.int64)
    found[int(group.rank())] = torch.tensor([queries, keys])
    with Flights(group, "context_parallel_attention") as flights:
        flights.all_reduce(found).wait()
    if (found != found[0]).any():
        raise UsageError(
            f"without a layout all ranks must have as many tokens; they have {found.tolist()} "
            "(queries, keys): pass the layout by which the sequence was divided"
        )


def shapes_of(q: Tensor, k: Tensor, plan: Plan, *, mesh: bool = False) -> Shapes:
    """For the choice of the route: the same on all ranks, however uneven their parts are."""
    batch, heads, _, width = q.shape
    size = plan.queries.size
    return Shapes(
        size=size,
        queries=batch * plan.queries.length // size,
        keys=batch * plan.keys.length // size,
        heads=heads,
        kv_heads=k.shape[1],
        width=width,
        item=q.element_size(),
        sum_item=torch.empty(0, dtype=sum_dtype(q.dtype)).element_size(),
        mesh=mesh,
    )


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        group: Any,
        plan: Plan,
        there: Rotate,
        back: Rotate,
    ) -> Tensor:
        with Flights(group, "context_parallel_attention") as flights:
            out, lse = forward(flights, there, q, k, v, plan)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.group, ctx.plan, ctx.rotate = group, plan, back
        return out

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        with Flights(ctx.group, "context_parallel_attention backward") as flights:
            found = backward(
                flights, ctx.rotate, grad.contiguous(), q, k, v, out, lse.to(_kernels(q)), ctx.plan
            )
        return *found, None, None, None, None


def _kernels(q: Tensor) -> torch.dtype:
    """The dtype in which the kernel wants lse."""
    return sum_dtype(q.dtype)


class ContextParallel(TorchFunctionMode):
    """Inside the block every `scaled_dot_product_attention` is context-parallel.

    with ContextParallel(length=8192, is_causal=True) as context:
        logits = model(context.shard(tokens, dim=1), context.positions)

    Everything else in a transformer is token by token, and needs no change; positions are those
    of this rank's tokens.
    """

    def __init__(
        self,
        *,
        length: int,
        is_causal: bool,
        group: Any = None,
        rotate: Route = "auto",
        mesh: bool = False,
    ) -> None:
        """Divide sequences of `length` tokens over the ranks of `group`.

        `rotate` and `mesh` are those of `context_parallel_attention`.
        """
        super().__init__()
        self._mesh = mesh
        self._group, self._rotate, self._causal = of(group), rotate, is_causal
        self.layout = Layout(length, int(self._group.size()), zigzag=is_causal)
        self._rank = int(self._group.rank())

    @property
    def positions(self) -> Tensor:
        """Where our tokens are in the sequence: int64, shape (our tokens,)."""
        spans = self.layout.spans(self._rank)
        return torch.cat([torch.arange(start, end) for start, end in spans])

    def shard(self, whole: Tensor, dim: int) -> Tensor:
        """Our part of a tensor that all ranks have."""
        return self.layout.take(whole, self._rank, dim)

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        return self._attend(*args, **kwargs)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if attn_mask is not None or dropout_p:
            raise UsageError("a mask or dropout cannot be split over ranks; use is_causal")
        if is_causal != self._causal:
            raise UsageError(f"the sequence was divided for is_causal={self._causal}")
        return context_parallel_attention(
            query,
            key,
            value,
            group=self._group,
            is_causal=is_causal,
            scale=scale,
            rotate=self._rotate,
            mesh=self._mesh,
            layout=self.layout,
        )
