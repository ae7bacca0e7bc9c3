"""Residual and RMSNorm in one: y = rms_norm(residual + x), and its gradient. Token by token.

On CUDA, where Triton is installed, one kernel reads and writes each element once (`norm_triton`).
"""

import importlib.util
from functools import cache

import torch

Tensor = torch.Tensor


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """What goes into a layer, and the new residual.

    Args:
      x: shape (rows, D): the output of the layer before, summed over ranks.
      residual: the same shape.
      weight: shape (D,).
      eps: added to the mean square.

    Returns:
      rms_norm(residual + x) * weight, and residual + x, in the dtype of `residual`; computed in
      float32 at least.
    """
    if x.is_cuda and _has_triton():
        from ftkit.collectives.overlap.norm_triton import add_rms_norm as fused

        return fused(x, residual, weight, eps)
    total = residual + x
    wide = _wide(total)
    scale = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return (wide * scale * _wide(weight)).to(residual.dtype), total


def rms_norm_backward(
    grad: Tensor, total: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of `total` and `weight`, where y = rms_norm(total) * weight; of these rows alone."""
    wide, grad = _wide(total), _wide(grad)
    scale = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    unit = wide * scale
    of_unit = grad * _wide(weight)
    of_total = scale * (of_unit - unit * (of_unit * unit).mean(-1, keepdim=True))
    return of_total.to(total.dtype), (grad * unit).sum(0)


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
