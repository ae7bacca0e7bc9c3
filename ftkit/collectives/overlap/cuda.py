"""Cuda: the overlapped linears on CUDA are torch's fused operators over symmetric memory.

There the chunks are copied by copy engines, or by NVLink multicast, while the multiplication runs;
nothing of that is written again here. Torch waits without a limit for the other ranks inside
such an operator: keep its group inside one failure unit (a tensor-parallel group that is
replaced as a whole), never across replicas.

Not tested on more than one GPU: on one the operators are those of `exchange`.
"""

from typing import Any

import torch

from ftkit.core.errors import UsageError


def serves(x: torch.Tensor, group: Any) -> bool:
    """Whether a call on `x` goes to torch's operators."""
    return bool(x.is_cuda and group.size() > 1)


def matmul_reduce_scatter(
    x: torch.Tensor, weight: torch.Tensor, dim: int, group: Any
) -> torch.Tensor:
    """Our rows of the sum of x @ weight.T, shape (our rows, N), as `exchange.scatter` gives them."""
    even(x.shape[dim], group)
    out: torch.Tensor = _operators().fused_matmul_reduce_scatter(
        x.contiguous(), weight.t(), "sum", dim, group.group_name
    )
    return out.movedim(dim, 0).reshape(-1, out.shape[-1])


def all_gather_matmul(
    mine: torch.Tensor, weight: torch.Tensor, group: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """All rows, and all rows @ weight.T."""
    whole, (out,) = _operators().fused_all_gather_matmul(
        mine.contiguous(), [weight.t()], 0, group.group_name
    )
    return whole, out


def _operators() -> Any:
    import torch.distributed._symmetric_memory

    return torch.ops.symm_mem


def even(rows: int, group: Any) -> None:
    """Raise UsageError unless all ranks have as many."""
    if rows % group.size():
        raise UsageError(
            f"on CUDA {rows} rows cannot be divided unevenly between {group.size()} ranks; pad them"
        )
