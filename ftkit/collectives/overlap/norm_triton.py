"""The kernel of `norm.add_rms_norm`: each program has one row, in registers from end to end."""

# Triton has no types, and its kernels are no Python.
# mypy: ignore-errors

import torch
import triton
import triton.language as tl


@triton.jit
def add_rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, total_ptr, width, eps, BLOCK: tl.constexpr
):
    """One row: y = (x + residual) / rms * weight, total = x + residual; in float32."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    at = row * width + columns
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    total = x + tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    # As the residual is kept, so it is normed: backward has nothing else.
    kept = total.to(total_ptr.dtype.element_ty)
    tl.store(total_ptr + at, kept, mask=inside)
    total = kept.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(total * total, 0) / width + eps)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    y = (total * scale * weight).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + at, y, mask=inside)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `norm.add_rms_norm`; rows of up to 64 Ki elements, contiguous."""
    x, residual = x.contiguous(), residual.contiguous()
    y, total = torch.empty_like(residual), torch.empty_like(residual)
    rows, width = x.shape
    if rows:
        block = triton.next_power_of_2(width)
        add_rms_norm_kernel[(rows,)](
            x,
            residual,
            weight,
            y,
            total,
            width,
            eps,
            BLOCK=block,
            num_warps=8 if block > 2048 else 4,
        )
    return y, total
