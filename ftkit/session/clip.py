"""Clip: gradients scaled by their norm, with the same bits whatever the world."""

from collections.abc import Iterable

import torch
from torch import nn

from ftkit.checkpoint.shards import is_dtensor, local_of
from ftkit.collectives.group import Group
from ftkit.collectives.norm import clip_factor, norm_of


def clip(
    modules: Iterable[nn.Module], norm_max: float, group: Group, *, stages: bool = False
) -> float:
    """Scale `.grad` of all parameters in place, by the norm over all ranks. Blocks.

    `stages`: every rank holds other parameters.

    Returns:
      The norm before.

    Raises:
      GenerationAborted: the generation ended meanwhile.
    """
    unique = {id(p): p for module in modules for p in module.parameters()}
    grads = [p.grad for p in unique.values() if p.grad is not None]
    sharded = [g for g in grads if is_dtensor(g)]
    local = [local_of(g) for g in grads]
    if sharded or stages:
        copies = _replicas(sharded[0]) if sharded else 1
        norm = norm_of(local, lambda told: group.exchange(told).wait(), replicas=copies)
    else:
        norm = norm_of(local)  # every rank has all of it
    factor = clip_factor(norm, norm_max)
    with torch.no_grad():
        for gradient in local:
            gradient.mul_(factor)
    return norm


def _replicas(tensor: torch.Tensor) -> int:
    """How many ranks of its mesh hold the same shard."""
    copies = 1
    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    for size, placement in zip(mesh.shape, placements, strict=True):
        copies *= 1 if placement.is_shard() else size
    return copies
