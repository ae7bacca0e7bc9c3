"""Attend: attention of one block, by torch's flash kernel, and how blocks are put together.

`lse` is the logarithm of the sum of exponentials of each query's scores: with it the results of
several blocks of keys are merged exactly (online softmax), and the backward of a block needs
nothing of the others but the merged output and lse.
"""

from typing import Self

import torch

from ftkit.core.errors import UsageError

Tensor = torch.Tensor


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which sums over ranks are kept."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, diagonal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Output (B, Hq, Sq, D) and lse (B, Hq, Sq) of queries over keys; none of them empty."""
    k, v = _repeated(k, q), _repeated(v, q)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q.contiguous(), k, v, 0.0, diagonal, scale=scale
    )
    return out, lse


def attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    diagonal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v that come from one block; `out` and `lse` are the merged ones."""
    given = [t.contiguous() for t in (grad, q, _repeated(k, q), _repeated(v, q), out, lse)]
    of_q, of_k, of_v = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *given, 0.0, diagonal, scale=scale
    )
    return of_q, _grouped(of_k, k), _grouped(of_v, v)


def check(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise UsageError for what cannot be attended to."""
    if q.device.type != "cpu":
        raise UsageError(
            "context_parallel_attention is for tensors on the CPU; on CUDA use "
            "torch.distributed.tensor.experimental.context_parallel"
        )
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or q.shape[::3] != k.shape[::3]:
        raise UsageError(
            "q, k and v must be (batch, heads, tokens, width) of one batch and width, k and v of one "
            f"shape, got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if not k.shape[1] or q.shape[1] % k.shape[1]:
        raise UsageError(f"{q.shape[1]} heads of queries cannot share {k.shape[1]} heads of keys")
    if not q.dtype == k.dtype == v.dtype:
        raise UsageError(f"q, k and v are of {q.dtype}, {k.dtype} and {v.dtype}")


class Merged:
    """The output of some queries, from the blocks that were attended to so far."""

    def __init__(self, out: Tensor, lse: Tensor) -> None:
        """Go on with these, in place."""
        self.out, self.lse = out, lse

    @classmethod
    def none(cls, q: Tensor) -> Self:
        """Of these queries, nothing yet."""
        dtype = sum_dtype(q.dtype)
        return cls(
            torch.zeros(q.shape, dtype=dtype),
            torch.full(q.shape[:3], float("-inf"), dtype=dtype),
        )

    def of(self, heads: slice) -> "Merged":
        """The same memory, for some heads."""
        return Merged(self.out[:, heads], self.lse[:, heads])

    def add(self, queries: slice, out: Tensor, lse: Tensor) -> None:
        """One more block, of these queries."""
        old = self.lse[:, :, queries]
        new = torch.logaddexp(old, lse.to(old.dtype))
        kept, added = (old - new).exp_().unsqueeze(-1), (lse - new).exp_().unsqueeze(-1)
        self.out[:, :, queries].mul_(kept).add_(out * added)
        self.lse[:, :, queries] = new


def _repeated(kv: Tensor, q: Tensor) -> Tensor:
    groups = q.shape[1] // kv.shape[1]
    return (kv.repeat_interleave(groups, 1) if groups > 1 else kv).contiguous()


def _grouped(grad: Tensor, kv: Tensor) -> Tensor:
    if grad.shape[1] == kv.shape[1]:
        return grad
    batch, _, *rest = grad.shape
    return grad.view(batch, kv.shape[1], -1, *rest).sum(2)
