"""Cases that train: DDP in every mode, on one group; parameters must come out bit for bit alike.

Run by two ranks: a sum of two terms has the same bits in either order.
"""

# mypy: allow-untyped-calls
# mypy: disable-error-code="union-attr,operator"

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from .case import Case, Side


def cases(size: int) -> Iterator[Case]:
    runs: dict[str, Callable[[Side], Any]] = {
        "plain": partial(train, dense),
        "as bucket views, small buckets": partial(
            train, dense, gradient_as_bucket_view=True, bucket_cap_mb=0.001
        ),
        "in no_sync but for the last": partial(train, dense, accumulate=3),
        "unused parameters": partial(train, partial(Branches, False), find_unused_parameters=True),
        "a static graph": partial(train, partial(Branches, True), static_graph=True),
        "buffers that are broadcast": partial(train, normed),
        "buffers of each rank's own": partial(train, normed, broadcast_buffers=False),
        "bfloat16": partial(train, dense, dtype=torch.bfloat16),
        "a hook that reduces": partial(train, dense, hook=default_hooks.allreduce_hook),
        "a hook that compresses": partial(train, dense, hook=default_hooks.fp16_compress_hook),
        "sparse gradients": partial(train, embedding, whole_numbers=True),
        "a sharded optimizer": partial(train, dense, optimizer=sharded_optimizer),
        "uneven batches": uneven,
        "weights that differ at first": partial(train, differently_born),
    }
    for name, run in runs.items():
        yield Case(f"ddp with {name}", run)


def dense():
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))


def normed():
    return nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))


def embedding():
    return nn.Sequential(nn.Embedding(20, 8, sparse=True), nn.Flatten(), nn.Linear(24, 4))


def differently_born():
    model = dense()
    with torch.no_grad():
        # DDP hands round the parameters of rank 0 when it is made.
        model[0].weight.add_(torch.distributed.get_rank())
    return model


class Branches(nn.Module):
    """Uses one branch of two: always the first, or in turn."""

    def __init__(self, fixed: bool) -> None:
        super().__init__()
        self.fixed, self.turn = fixed, 0
        self.one, self.two = nn.Linear(16, 4), nn.Linear(16, 4)

    def forward(self, x):
        self.turn += 1
        return (self.one if self.fixed or self.turn % 2 else self.two)(x)


def train(
    build,
    side: Side,
    *,
    accumulate=1,
    dtype=torch.float32,
    hook=None,
    optimizer=None,
    whole_numbers=False,
    **options,
):
    torch.manual_seed(7)
    model = DistributedDataParallel(build().to(dtype), process_group=side.group, **options)
    if hook is not None:
        model.register_comm_hook(side.group, hook)
    if optimizer is None:
        step_by = torch.optim.SGD(model.parameters(), 0.05)
    else:
        step_by = optimizer(model, side)
    losses = []
    for step in range(3):
        for part in range(accumulate):
            with nullcontext() if part == accumulate - 1 else model.no_sync():
                loss = model(batch(side, step, part, dtype, whole_numbers)).float().pow(2).mean()
                loss.backward()
                losses.append(loss.detach())
        step_by.step()
        step_by.zero_grad()
    return losses, list(model.module.state_dict().values())


def batch(side, step, part, dtype, whole_numbers):
    generator = torch.Generator().manual_seed(100 * step + 10 * part + side.rank)
    if whole_numbers:
        return torch.randint(0, 20, (8, 3), generator=generator)
    return torch.randn(8, 16, generator=generator).to(dtype)


def sharded_optimizer(model, side):
    # Its import warns of torch's own use of torch.jit.
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(
        model.parameters(), torch.optim.Adam, process_group=side.group, lr=0.01
    )


def uneven(side: Side):
    torch.manual_seed(7)
    model = DistributedDataParallel(dense(), process_group=side.group)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    with model.join():
        for step in range(2 + side.rank):
            model(batch(side, step, 0, torch.float32, False)).pow(2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return list(model.module.state_dict().values())
