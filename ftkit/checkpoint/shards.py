"""DTensors as what they are in memory: boxes of a larger tensor, in this rank's local tensor.

Nothing here imports `torch.distributed.tensor`, which costs 0.9 s at the start of a rank:
where a DTensor exists, somebody else has.
"""

import sys
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import product
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import nn

from ftkit.checkpoint.box import Box
from ftkit.core.errors import UsageError

Run = tuple[int, int]
"""A first index and a count."""


def is_dtensor(tensor: object) -> bool:
    """Whether it is a DTensor, without importing what defines it."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a tensor on this rank: a DTensor's local tensor, or the tensor itself."""
    # to_local() gives parameters a new view each time, and records it for autograd.
    local: torch.Tensor = tensor._local_tensor if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]
    return local


def fresh_like(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Memory for a tensor of the same shape, placed alike; its bytes are anything."""
    if not is_dtensor(tensor):
        return torch.empty_like(tensor, dtype=dtype, requires_grad=False)
    # `empty_like` would have DTensor work out a placement that is known.
    made: torch.Tensor = type(tensor).from_local(  # type: ignore[attr-defined]
        torch.empty_like(local_of(tensor).detach(), dtype=dtype),
        tensor.device_mesh,  # type: ignore[attr-defined]
        tensor.placements,  # type: ignore[attr-defined]
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )
    return made


def boxes_of(name: str, tensor: torch.Tensor) -> list[tuple[Box, torch.Tensor]]:
    """The boxes of a tensor that this rank holds, each with a view of its memory.

    A plain tensor is one box: itself. A DTensor is one box too (possibly empty), except where
    a strided shard has not been cut further (FSDP over tensor parallelism on the same
    dimension, later gathered along one of the two): then it is several.

    Args:
      name: what to call it in errors.
      tensor: any. A plain one is returned itself, a DTensor's views are without gradients.

    Raises:
      UsageError: a DTensor with unreduced (Partial) or unknown placements, on a mesh without
        this rank, or whose local tensor is not of the size its placements say.
    """
    shape = tuple(tensor.shape)
    if not is_dtensor(tensor):
        return [(Box.whole(shape), tensor)]
    local = local_of(tensor).detach()
    mesh, placements = tensor.device_mesh, tuple(tensor.placements)  # type: ignore[attr-defined]
    for placement in placements:
        if placement.is_partial():
            raise UsageError(
                f"{name} is a DTensor with an unreduced placement {placement}: no rank has its "
                "value. Redistribute it to Shard or Replicate before protecting it"
            )
        if type(placement).__name__ not in ("Replicate", "Shard", "_StridedShard"):
            raise UsageError(f"{name} is a DTensor placed as {placement}, which is not known here")
    axes = _runs(shape, tuple(mesh.shape), _coordinate(name, mesh), placements)
    implied = tuple(sum(count for _, count in runs) for runs in axes)
    if implied != tuple(local.shape):
        raise UsageError(
            f"{name} is a DTensor of {list(shape)} placed as {placements} on a mesh of "
            f"{list(mesh.shape)}: this rank should hold {list(implied)} of it and holds "
            f"{list(local.shape)}. Nobody can tell which elements these are; choose sizes that "
            "the mesh divides"
        )
    return list(_cut(local, axes))


def register_shards(module: nn.Module) -> None:
    """Have FSDP2 register its sharded parameters again, as its own `state_dict` does.

    A forward pass without backward (evaluation) leaves the unsharded ones in place.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None:
        for part in module.modules():
            if isinstance(part, fsdp.FSDPModule):
                part.reshard()


#: Of each mesh, its ranks: a mesh works them out anew each time, and every tensor asks.
_RANKS: WeakKeyDictionary[Any, torch.Tensor] = WeakKeyDictionary()


def _coordinate(name: str, mesh: Any) -> tuple[int, ...]:
    """This rank's place in a mesh.

    Not `mesh.get_coordinate()`: FSDP2 keeps the meshes it makes for the life of the process,
    with the coordinate they had then, and a process may have become another rank since.
    """
    rank = dist.get_rank()
    ranks = _RANKS.get(mesh)
    if ranks is None:
        ranks = _RANKS[mesh] = mesh.mesh
    found: list[list[int]] = (ranks == rank).nonzero().tolist()
    if len(found) != 1:
        raise UsageError(
            f"{name} is a DTensor on a mesh of ranks {ranks.tolist()}, and this is rank "
            f"{rank}: protect the parts of the model that this rank has"
        )
    return tuple(found[0])


@lru_cache(maxsize=4096)
def _runs(
    shape: tuple[int, ...],
    mesh_shape: tuple[int, ...],
    coordinate: tuple[int, ...],
    placements: tuple[Any, ...],
) -> tuple[tuple[Run, ...], ...]:
    """By dimension, the indices of the whole tensor that one rank holds, in local order.

    Mesh dimensions cut one after another, left to right, each what the last one left.
    """
    axes: list[tuple[Run, ...]] = [((0, size),) for size in shape]
    for size, mine, placement in zip(mesh_shape, coordinate, placements, strict=True):
        if placement.is_replicate():
            continue
        runs = axes[placement.dim]
        length = sum(count for _, count in runs)
        if hasattr(placement, "split_factor"):
            kept = _strided(length, size, mine, placement)
        else:
            count, first = placement.local_shard_size_and_offset(length, size, mine)
            kept = [(int(first), int(count))] if count else []
        axes[placement.dim] = tuple(r for first, count in kept for r in _take(runs, first, count))
    return tuple(axes)


def _strided(length: int, parts: int, mine: int, placement: Any) -> list[Run]:
    """What one part keeps of `length` indices under a `_StridedShard`."""
    from torch.distributed.tensor.placement_types import _StridedShardOffsetMode

    count, found = placement.local_shard_size_and_offset(
        length, parts, mine, _StridedShardOffsetMode.ALL
    )
    return _joined((index, 1) for index in found) if count else []


def _take(runs: Sequence[Run], first: int, count: int) -> Iterator[Run]:
    """Positions `first` to `first + count` of the indices that `runs` list."""
    for start, length in runs:
        low, high = max(first, 0), min(first + count, length)
        if low < high:
            yield start + low, high - low
        first -= length


def _joined(runs: Any) -> list[Run]:
    """The same indices in as few runs as possible."""
    joined = list[Run]()
    for start, count in runs:
        if joined and sum(joined[-1]) == start:
            joined[-1] = joined[-1][0], joined[-1][1] + count
        else:
            joined.append((start, count))
    return joined


def _cut(local: torch.Tensor, axes: Sequence[Sequence[Run]]) -> Iterator[tuple[Box, torch.Tensor]]:
    """Each box of the product of `axes`, with its part of the local tensor."""
    if not all(axes):
        yield Box((0,) * local.dim(), tuple(local.shape)), local
        return
    for runs in product(*axes):
        view = local
        for axis, run in enumerate(runs):
            if len(axes[axis]) > 1:
                at = sum(count for _, count in axes[axis][: axes[axis].index(run)])
                view = view.narrow(axis, at, run[1])
        yield Box(tuple(o for o, _ in runs), tuple(n for _, n in runs)), view
