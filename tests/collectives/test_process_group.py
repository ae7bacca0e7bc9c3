"""The process group as the default one of torch.distributed. (For what it answers to each
call, and for what is built on it, see `conformance`.)"""

# torch's stubs know neither what a default group is nor its private helpers.
# mypy: allow-untyped-calls
# mypy: disable-error-code="index,comparison-overlap,arg-type,union-attr,attr-defined,assignment"

import pytest
import torch
import torch.distributed as dist

from .crew import Crew
from .scratch import scratch_path

pytestmark = pytest.mark.multiproc


def start(rank, size, path):
    from ftkit.collectives.backend import register

    register()
    store = dist.FileStore(path, size)
    dist.init_process_group("ftkit", store=store, rank=rank, world_size=size)


def a_mesh_of_its_own(rank, size, talk, path):
    """`init_device_mesh` makes its groups of the default backend, which is ours."""
    from torch.distributed.device_mesh import init_device_mesh

    start(rank, size, path)
    mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("dp", "tp"))
    tensor = torch.tensor([float(rank)])
    dist.all_reduce(tensor, group=mesh["tp"].get_group())
    assert tensor.item() == 2 * (rank // 2 * 2) + 1
    tensor = torch.tensor([float(rank)])
    dist.all_reduce(tensor, group=mesh["dp"].get_group())
    assert tensor.item() == 2 * (rank % 2) + 2
    assert dist.get_backend(mesh["dp"].get_group()) == "ftkit"
    dist.barrier()
    dist.destroy_process_group()
    return "fine"


def test_a_mesh_is_made_of_ftkit_groups():
    with Crew(a_mesh_of_its_own, 4, scratch_path()) as crew:
        assert crew.results() == ["fine"] * 4


def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))


def batch(step, rank, size):
    torch.manual_seed(100 + step)
    return torch.randn(8 * size, 32)[rank * 8 : (rank + 1) * 8]


def train_three_steps(rank, size, talk, path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    start(rank, size, path)
    alone = net()
    opt = torch.optim.SGD(alone.parameters(), 0.1)
    for step in range(3):
        opt.zero_grad()
        torch.stack(
            [alone(batch(step, r, size)).pow(2).mean() for r in range(size)]
        ).mean().backward()
        opt.step()
    ddp = torch.nn.parallel.DistributedDataParallel(net())
    opt = torch.optim.SGD(ddp.parameters(), 0.1)
    for step in range(3):
        opt.zero_grad()
        ddp(batch(step, rank, size)).pow(2).mean().backward()
        opt.step()
    for a, b in zip(ddp.module.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    sharded = net()
    mesh = init_device_mesh("cpu", (size,))
    for layer in (sharded[0], sharded[2], sharded):
        fully_shard(layer, mesh=mesh)
    opt = torch.optim.SGD(sharded.parameters(), 0.1)
    for step in range(3):
        opt.zero_grad()
        sharded(batch(step, rank, size)).pow(2).mean().backward()
        opt.step()
    for a, b in zip(sharded.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(a.full_tensor(), b)
    dist.destroy_process_group()
    return "equal"


def test_ddp_and_fsdp_train_like_one_process():
    with Crew(train_three_steps, 2, scratch_path()) as crew:
        assert crew.results() == ["equal"] * 2
