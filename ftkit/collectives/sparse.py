"""Sparse all-reduce: sums of COO tensors, as embeddings with `sparse=True` make them.

Ranks hold different numbers of entries at different places. Everybody's entries go to all
in one exchange, are put together in rank order, and coalesced: the same bits on every rank.
"""

from collections.abc import Generator
from typing import cast

import torch

from ftkit.collectives.arithmetic import Bytes, as_bytes, average, copy
from ftkit.collectives.op import Op, Program, Wait
from ftkit.core.errors import Refused


def all_reduce(mine: torch.Tensor, op_name: str) -> Program:
    """The sum, or average, of all ranks' coalesced tensors; value: a new coalesced tensor."""
    indices, values = mine.indices().contiguous(), mine.values().contiguous()

    def program(op: Op) -> Generator[Wait, None, torch.Tensor]:
        parts = [as_bytes(indices), as_bytes(values)]
        sent = [op.send(r, data, part=i) for r in op.others() for i, data in enumerate(parts)]
        came = {r: [op.recv(r, None, part=i) for i in range(2)] for r in op.others()}
        yield [*sent, *(ticket for tickets in came.values() for ticket in tickets)]
        came_data = {r: [cast("Bytes", t.data) for t in tickets] for r, tickets in came.items()}
        everybodys = [came_data.get(r, parts) for r in range(op.size)]
        counts = [part[0].size // (indices.itemsize * len(indices)) for part in everybodys]
        places = [
            _typed(part[0], indices).view(len(indices), n)
            for part, n in zip(everybodys, counts, strict=True)
        ]
        entries = [
            _typed(part[1], values).view(n, *values.shape[1:])
            for part, n in zip(everybodys, counts, strict=True)
        ]
        total = torch.sparse_coo_tensor(
            torch.cat(places, 1), torch.cat(entries), mine.shape, check_invariants=True
        ).coalesce()
        if op_name == "avg":
            average(values.dtype, as_bytes(total.values()), op.size)
        return total

    return program


def check(tensor: torch.Tensor, op_name: str) -> None:
    """Raise Refused for what cannot be reduced."""
    if tensor.layout != torch.sparse_coo or tensor.device.type != "cpu":
        raise Refused(f"cannot reduce {tensor.layout} tensors on {tensor.device}")
    if op_name not in ("sum", "avg"):
        raise Refused(f"sparse tensors can be summed, not reduced by {op_name!r}")


def replace(tensor: torch.Tensor, total: torch.Tensor) -> None:
    """Let `tensor` hold what `total` holds."""
    with torch.no_grad():
        tensor.copy_(total)


def _typed(data: Bytes, like: torch.Tensor) -> torch.Tensor:
    """A copy: what came in may be read-only, and memory of no bytes has no dtype."""
    typed = torch.empty(data.size // like.itemsize, dtype=like.dtype)
    copy(as_bytes(typed), data)
    return typed


def nbytes(tensor: torch.Tensor) -> int:
    """Bytes of a coalesced tensor."""
    return tensor.indices().nbytes + tensor.values().nbytes
