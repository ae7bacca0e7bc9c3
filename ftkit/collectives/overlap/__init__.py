"""Overlap: communication behind computation, in a user's own model. See `docs/overlap.md`."""

from ftkit.collectives.overlap.attention import ContextParallel, context_parallel_attention
from ftkit.collectives.overlap.linear import (
    all_gather_linear,
    linear_all_reduce,
    linear_reduce_scatter,
    linear_replicated,
)
from ftkit.collectives.overlap.modules import ColumnParallelLinear, RowParallelLinear
from ftkit.collectives.overlap.offload import offload_activations
from ftkit.collectives.overlap.traffic import TrafficGovernor
from ftkit.collectives.overlap.weave import Layer, Weave

__all__ = [
    "ColumnParallelLinear",
    "ContextParallel",
    "Layer",
    "RowParallelLinear",
    "TrafficGovernor",
    "Weave",
    "all_gather_linear",
    "context_parallel_attention",
    "linear_all_reduce",
    "linear_reduce_scatter",
    "linear_replicated",
    "offload_activations",
]
