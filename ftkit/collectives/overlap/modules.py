"""RowParallelLinear, ColumnParallelLinear: layers that hold their part of a linear layer.

As in Megatron-LM: a column-parallel layer, something element-wise, and a row-parallel layer make
a block that is split over ranks, with one exchange at each end. With `sequence=True` what is
between blocks is split by rows (sequence parallelism), without it all ranks have all of it.
"""

from typing import Any, Self, cast

import torch
from torch import nn

from ftkit.collectives.overlap import linear
from ftkit.collectives.overlap.auto import Chunks
from ftkit.collectives.overlap.autograd import uncompiled
from ftkit.collectives.overlap.flights import copied, of
from ftkit.collectives.overlap.parts import bounds


class _Parallel(nn.Module):
    """What both have: a part of the weight, a bias or none, and how calls are made."""

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        group: Any = None,
        sequence: bool = True,
        dim: int = 0,
        chunks: Chunks = "auto",
    ) -> None:
        """Take over this rank's part of the parameters; `of` cuts them out of a whole layer.

        Args:
          weight: our part.
          bias: ours.
          group: the ranks; None for the default group.
          sequence: whether the other side of the block is split by rows.
          dim: the dimension of those rows.
          chunks: see `linear.linear_reduce_scatter`.
        """
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.group, self.sequence, self.dim, self.chunks = group, sequence, dim, chunks

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return cast("Self", copied(self, self.group, memo))

    def extra_repr(self) -> str:
        return f"weight={tuple(self.weight.shape)}, sequence={self.sequence}, chunks={self.chunks}"


class RowParallelLinear(_Parallel):
    """x (..., K/n) -> (..., N): the sum over ranks, our rows of it or all.

    `weight` is (N, K/n), `bias` (N,) and the same on all ranks.
    """

    @classmethod
    def of(cls, whole: nn.Linear, *, group: Any = None, **options: Any) -> Self:
        """Our part of a layer that is the same on all ranks; its parameters are copied."""
        start, end = _ours(whole.in_features, group)
        whole_bias = cast("torch.Tensor | None", whole.bias)
        bias = None if whole_bias is None else whole_bias.detach().clone()
        weight = whole.weight.detach()[:, start:end].clone()
        return cls(weight, bias, group=group, **options)

    @uncompiled
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.sequence:
            return linear.linear_reduce_scatter(
                x, self.weight, self.bias, group=self.group, dim=self.dim, chunks=self.chunks
            )
        return linear.linear_all_reduce(
            x, self.weight, self.bias, group=self.group, chunks=self.chunks
        )


class ColumnParallelLinear(_Parallel):
    """x (..., K), our rows or all -> (..., N/n), all rows and our columns.

    `weight` is (N/n, K), `bias` (N/n,).
    """

    @classmethod
    def of(cls, whole: nn.Linear, *, group: Any = None, **options: Any) -> Self:
        """As `RowParallelLinear.of`."""
        start, end = _ours(whole.out_features, group)
        whole_bias = cast("torch.Tensor | None", whole.bias)
        bias = None if whole_bias is None else whole_bias.detach()[start:end].clone()
        return cls(whole.weight.detach()[start:end].clone(), bias, group=group, **options)

    @uncompiled
    def forward(self, x: torch.Tensor, rows: int | None = None) -> torch.Tensor:
        """`rows` of the whole in `dim`, where ranks have not all as many."""
        if self.sequence:
            return linear.all_gather_linear(
                x,
                self.weight,
                self.bias,
                group=self.group,
                dim=self.dim,
                rows=rows,
                chunks=self.chunks,
            )
        return linear.linear_replicated(
            x, self.weight, self.bias, group=self.group, chunks=self.chunks
        )


def _ours(length: int, group: Any) -> tuple[int, int]:
    group = of(group)
    return bounds(length, int(group.size()), int(group.rank()))
