"""DDP over a Group that is edited under it: errors surface cleanly, and training goes on."""

# mypy: allow-untyped-calls

import time

import pytest
import torch
import torch.distributed as dist

from ftkit.core.errors import GenerationAborted
from ftkit.core.ids import Generation

from .crew import Crew
from .worlds import join, world

pytestmark = pytest.mark.multiproc


def begin(rank, size, talk):
    from ftkit.collectives.backend import bind, register

    register()
    group, faults, addresses = join(rank, talk, "auto")
    bind(group)
    dist.init_process_group(
        "ftkit", rank=rank, world_size=size, store=torch._C._distributed_c10d.HashStore()
    )
    return group, faults, addresses


def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 8))


def train(model, optimizer, step):
    optimizer.zero_grad()
    torch.manual_seed(step)
    model(torch.randn(8, 64)).pow(2).mean().backward()
    optimizer.step()


def ddp_through_an_abort(rank, size, talk, good_steps):
    group, faults, addresses = begin(rank, size, talk)
    model = torch.nn.parallel.DistributedDataParallel(net(), bucket_cap_mb=0.02)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(good_steps):
        train(model, optimizer, step)
    saved = [p.detach().clone() for p in model.parameters()]
    raised = 0
    for generation in (2, 3):
        if rank == 0:
            # Its peers wait in backward for a rank that never comes.
            time.sleep(0.3)
            group.abort(Generation(generation - 1), "drill")
        with pytest.raises((RuntimeError, GenerationAborted), match="drill"):
            train(model, optimizer, 1)
        raised += 1
        group.edit(world(generation, addresses), timeout_s=20)
        with torch.no_grad():
            for p, s in zip(model.parameters(), saved, strict=True):
                p.copy_(s)
    for step in range(1, 4):
        train(model, optimizer, step)
    sums = [None] * size
    dist.all_gather_object(sums, [p.sum().item() for p in model.parameters()])
    assert all(s == sums[0] for s in sums)
    group.barrier().wait(10)
    dist.destroy_process_group()
    assert group.exchange(b"the group is the session's and lives on").wait(10)
    group.close()
    return raised, len(faults)


# In its second forward DDP rebuilds its buckets, with collectives of its own; from the third
# on, the abort strikes in backward, where the error passes through C++.
@pytest.mark.parametrize("good_steps", [1, 2])
def test_ddp_raises_on_an_abort_and_trains_on_in_the_next_generation(good_steps):
    with Crew(ddp_through_an_abort, 3, good_steps) as crew:
        assert crew.results() == [(2, 2)] * 3


def a_smaller_world(rank, size, talk):
    group, _, addresses = begin(rank, size, talk)
    pair = dist.new_group([0, 2])
    trio = dist.new_group([0, 1, 2])
    dist.barrier()
    talk.everyone("all are through")
    if rank == 0:
        group.close()
        return None
    del addresses[0]
    group.edit(world(2, addresses), timeout_s=20)
    assert (dist.get_rank(), dist.get_world_size()) == (rank - 1, size - 1)
    t = torch.tensor([float(rank)])
    dist.broadcast(t, src=1)  # by the ranks of the new world: member 2
    assert t.item() == 2
    got = [None] * (size - 1)
    dist.all_gather_object(got, rank)
    assert got == [1, 2]
    with pytest.raises(GenerationAborted, match="not in generation 2"):
        dist.all_reduce(t, group=trio)
    if rank == 2:
        with pytest.raises(GenerationAborted, match="not in generation 2"):
            dist.all_reduce(t, group=pair)
    again = dist.new_group([0, 1])
    t = torch.ones(1)
    dist.all_reduce(t, group=again)
    assert t.item() == 2
    assert dist.get_process_group_ranks(dist.group.WORLD) == [0, 1]
    dist.barrier()
    dist.destroy_process_group()
    group.barrier().wait(10)
    group.close()
    return "fine"


def test_ranks_and_groups_follow_the_world():
    with Crew(a_smaller_world, 3) as crew:
        assert crew.results() == [None, "fine", "fine"]


def late(rank, size, talk):
    group, faults, _ = begin(rank, size, talk)
    from datetime import timedelta

    group_with_limit = dist.new_group([0, 1], timeout=timedelta(seconds=0.5))
    if rank == 0:
        with pytest.raises(GenerationAborted, match=r"exceeded its timeout.*members \[1\]"):
            dist.all_reduce(torch.ones(1), group=group_with_limit)
    faults.wait()
    group.close()
    return len(faults)


def test_an_operation_past_its_timeout_ends_the_generation_and_names_who_is_missing():
    with Crew(late, 2) as crew:
        assert crew.results() == [1, 1]
