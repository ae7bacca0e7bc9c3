"""Gradients that are not finite are told by the rank that has them, before they are mixed."""

import math

import pytest
import torch
import torch.distributed as dist

from ftkit.collectives.finite import watch_gradients
from ftkit.core.errors import UsageError
from tests.collectives.crew import Crew
from tests.collectives.scratch import scratch_path
from tests.collectives.test_process_group import batch, net, start


def test_a_model_that_reduces_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="Linear reduces no gradients"):
        watch_gradients(torch.nn.Linear(2, 2), lambda *_: None)


def train_with_a_nan(rank, size, talk, path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    start(rank, size, path)
    told: list[list[tuple[int, bool]]] = []
    ddp = torch.nn.parallel.DistributedDataParallel(net())
    sharded = net()
    mesh = init_device_mesh("cpu", (size,))
    for layer in (sharded[0], sharded[2], sharded):
        fully_shard(layer, mesh=mesh)
    for model in (ddp, sharded):
        seen: list[tuple[int, float]] = []
        watch_gradients(model, lambda *what, seen=seen: seen.append(what))
        for step in range(2):
            x = batch(step, rank, size)
            if (step, rank) == (1, 1):
                x[0, 0] = math.nan
            model.zero_grad()
            model(x).pow(2).mean().backward()
        told.append([(bucket, math.isnan(norm)) for bucket, norm in seen])
    grad = next(iter(ddp.parameters())).grad
    assert grad is not None
    assert not grad.isfinite().all(), "it is everybody's afterwards"
    dist.destroy_process_group()
    return told


@pytest.mark.multiproc
def test_ddp_and_fsdp_tell_of_the_rank_whose_they_are() -> None:
    with Crew(train_with_a_nan, 2, scratch_path()) as crew:
        innocent, culprit = crew.results()
    assert innocent == [[], []]
    ddp, fsdp = culprit
    assert ddp == [(0, True)]
    assert {bucket for bucket, _ in fsdp} <= {0, 1, 2}
    assert fsdp
    assert all(nan for _, nan in fsdp)
