"""DDP with the quantized hook: close to plain DDP, and the same bits on every rank."""

# mypy: allow-untyped-calls

import zlib
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from ftkit.core.errors import UsageError

from .crew import Crew
from .worlds import join


def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 8))


def trained(rank, hook):
    ddp = torch.nn.parallel.DistributedDataParallel(net(), bucket_cap_mb=0.02)
    if hook is not None:
        ddp.register_comm_hook(None, hook)
    optimizer = torch.optim.SGD(ddp.parameters(), 0.05)
    for step in range(5):
        torch.manual_seed(100 * step + rank)
        optimizer.zero_grad()
        ddp(torch.randn(8, 64)).pow(2).mean().backward()
        optimizer.step()
    return torch.cat([p.detach().reshape(-1) for p in ddp.parameters()])


def both(rank, size, talk):
    from ftkit.collectives.backend import bind, register
    from ftkit.collectives.quantized_hook import QuantizedHook

    register()
    group, _, _ = join(rank, talk, "auto")
    bind(group)
    dist.init_process_group(
        "ftkit", rank=rank, world_size=size, store=torch._C._distributed_c10d.HashStore()
    )
    plain = trained(rank, None)
    start = torch.cat([p.detach().reshape(-1) for p in net().parameters()])
    digests = []
    for codec, feedback in (("int8", False), ("int8", True), ("bf16", False)):
        got = trained(rank, QuantizedHook(dist.group.WORLD, codec=codec, feedback=feedback))
        assert (got - plain).norm() < 0.02 * (plain - start).norm()
        assert not torch.equal(got, plain), "the hook was used"
        digests.append(zlib.crc32(got.numpy().tobytes()))
    dist.barrier()
    if rank == 0:
        wait_in_vain(dist.group.WORLD)
    talk.everyone(None)
    dist.destroy_process_group()
    group.close()
    return digests


def wait_in_vain(world):
    """The group's timeout ends what the others never come to."""
    from ftkit.collectives.quantized_hook import QuantizedHook

    class Bucket:
        def buffer(self):
            return torch.ones(8)

    world.set_timeout(timedelta(seconds=0.2))
    with pytest.raises(RuntimeError, match="exceeded its timeout"):
        QuantizedHook(world)(None, Bucket()).wait()


@pytest.mark.multiproc
def test_ddp_trains_alike_on_all_ranks_and_near_plain_ddp():
    with Crew(both, 2) as crew:
        first, second = crew.results()
    assert first == second


def test_another_backend_is_refused():
    from ftkit.collectives.quantized_hook import QuantizedHook

    with pytest.raises(UsageError, match="not NoneType"):
        QuantizedHook(None)
