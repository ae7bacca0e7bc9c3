"""Rowwise, Colwise: DTensor's parallel styles whose linear layers overlap.

    parallelize_module(block, mesh, {"up": Colwise(), "down": Rowwise()})

Drop-in for `RowwiseParallel` and `ColwiseParallel` on `nn.Linear`: parameters become the same
DTensors, layouts mean the same, and only what the layer computes is replaced. Layouts that
`ftkit.collectives.overlap.linear` has no operator for are left to DTensor.
"""

# torch's styles have no types for their helpers.
# mypy: disable-error-code="no-untyped-call"

from typing import Any, cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

from ftkit.collectives.overlap import linear
from ftkit.collectives.overlap.auto import Chunks


class Rowwise(RowwiseParallel):
    """Input split by columns; output summed on all ranks (the default), or split by rows."""

    def __init__(self, *, chunks: Chunks = "auto", **options: Any) -> None:
        """As `RowwiseParallel`, and `chunks` as `linear.linear_reduce_scatter`."""
        super().__init__(**options)
        self._chunks = chunks

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        (into,), (out,) = self.input_layouts, self.output_layouts
        splits = isinstance(out, Shard) and out.dim >= 0
        if not (
            isinstance(module, nn.Linear) and into == Shard(-1) and (splits or out == Replicate())
        ):
            return super()._apply(module, device_mesh)
        self._partition_linear_fn("", module, device_mesh)
        group, chunks = device_mesh.get_group(), self._chunks

        def forward(x: torch.Tensor) -> torch.Tensor:
            x = _local(x, device_mesh, Shard(x.ndim - 1))
            weight, bias = _parts(module)
            if isinstance(out, Shard):
                y = linear.linear_reduce_scatter(
                    x, weight, bias, group=group, dim=out.dim, chunks=chunks
                )
            else:
                y = linear.linear_all_reduce(x, weight, bias, group=group, chunks=chunks)
            return y if self.use_local_output else _global(y, device_mesh, out)

        module.forward = forward  # type: ignore[method-assign, assignment]
        return module


class Colwise(ColwiseParallel):
    """Input on all ranks (the default), or split by rows; output split by columns."""

    def __init__(self, *, chunks: Chunks = "auto", **options: Any) -> None:
        """As `ColwiseParallel`, and `chunks` as `linear.linear_reduce_scatter`."""
        super().__init__(**options)
        self._chunks = chunks

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        (into,), (out,) = self.input_layouts, self.output_layouts
        splits = isinstance(into, Shard) and into.dim >= 0
        if not (
            isinstance(module, nn.Linear) and out == Shard(-1) and (splits or into == Replicate())
        ):
            return super()._apply(module, device_mesh)
        self._partition_linear_fn("", module, device_mesh)
        group, chunks = device_mesh.get_group(), self._chunks

        def forward(x: torch.Tensor) -> torch.Tensor:
            rows = x.shape[into.dim] if isinstance(x, DTensor) and isinstance(into, Shard) else None
            x = _local(x, device_mesh, into)
            weight, bias = _parts(module)
            if isinstance(into, Shard):
                y = linear.all_gather_linear(
                    x, weight, bias, group=group, dim=into.dim, rows=rows, chunks=chunks
                )
            else:
                y = linear.linear_replicated(x, weight, bias, group=group, chunks=chunks)
            return y if self.use_local_output else _global(y, device_mesh, Shard(y.ndim - 1))

        module.forward = forward  # type: ignore[method-assign, assignment]
        return module


def _local(x: torch.Tensor, mesh: DeviceMesh, layout: Placement) -> torch.Tensor:
    """This rank's part of the input: as it is, or of a DTensor in that layout."""
    if not isinstance(x, DTensor):
        return x
    return x.redistribute(mesh, [layout]).to_local()


def _global(x: torch.Tensor, mesh: DeviceMesh, layout: Placement) -> torch.Tensor:
    return DTensor.from_local(x, mesh, [layout], run_check=False)


def _parts(module: nn.Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The local tensors behind the parameters; gradients flow back into the DTensors."""
    weight, bias = cast("DTensor", module.weight), cast("DTensor | None", module.bias)
    return weight.to_local(), None if bias is None else bias.to_local()
