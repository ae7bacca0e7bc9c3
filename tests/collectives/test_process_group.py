"""The process group under torch.distributed, through everything that is built on it."""

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
    return dist.new_group(backend="gloo")


def objects_and_friends(rank, size, talk, path):
    import torch.distributed._functional_collectives as fc
    from torch.distributed.device_mesh import init_device_mesh

    start(rank, size, path)
    got = [None] * size
    dist.all_gather_object(got, {"rank": rank, "pad": "x" * rank * 100})
    assert [g["rank"] for g in got] == list(range(size))
    box = [rank, "from", rank]
    dist.broadcast_object_list(box, src=1)
    assert box == [1, "from", 1]
    gathered = [None] * size if rank == 0 else None
    dist.gather_object(("g", rank), gathered, dst=0)
    assert rank or gathered == [("g", r) for r in range(size)]
    mine = [None]
    dist.scatter_object_list(mine, [f"to {r}" for r in range(size)] if rank == 0 else None, src=0)
    assert mine == [f"to {rank}"]

    total = float(sum(range(size)))
    assert (
        fc.all_reduce(torch.full((3,), float(rank)), "sum", dist.group.WORLD).tolist()
        == [total] * 3
    )
    whole = fc.all_gather_tensor(torch.full((2,), float(rank)), 0, dist.group.WORLD)
    assert whole.tolist() == [float(r) for r in range(size) for _ in range(2)]
    part = fc.reduce_scatter_tensor(torch.arange(2.0 * size), "sum", 0, dist.group.WORLD)
    assert part.tolist() == [size * 2.0 * rank, size * (2.0 * rank + 1)]
    swapped = fc.all_to_all_single(
        torch.arange(float(size)) + 10 * rank, None, None, dist.group.WORLD
    )
    assert swapped.tolist() == [10.0 * r + rank for r in range(size)]

    # both sides receive first, then send: nothing may wait for the other's order
    peer = (rank + 1) % size
    before = (rank - 1) % size
    big = torch.full((400_000,), float(rank))
    into = torch.empty_like(big)
    ops = [dist.P2POp(dist.irecv, into, before), dist.P2POp(dist.isend, big, peer)]
    for work in dist.batch_isend_irecv(ops):
        work.wait()
    assert into.eq(before).all()
    # tags meet tags, out of order
    if rank == 0:
        works = [dist.isend(torch.tensor([float(tag)]), 1, tag=tag) for tag in (5, 6, 7)]
        for work in works:
            work.wait()
    elif rank == 1:
        for tag in (7, 5, 6):
            t = torch.zeros(1)
            dist.recv(t, 0, tag=tag)
            assert t.item() == tag
    # from anybody
    if rank == 0:
        seen = set()
        for _ in range(size - 1):
            t = torch.zeros(1)
            source = dist.recv(t)
            assert t.item() == source
            seen.add(source)
        assert seen == set(range(1, size))
    else:
        dist.send(torch.tensor([float(rank)]), 0)
    # to ourselves
    t = torch.zeros(3)
    work = dist.irecv(t, rank)
    dist.isend(torch.ones(3), rank).wait()
    work.wait()
    assert t.eq(1).all()

    pair = dist.new_group([0, 1])
    if rank < 2:
        t = torch.tensor([rank + 1.0])
        dist.all_reduce(t, group=pair)
        assert t.item() == 3
        t = torch.tensor([float(rank)])
        dist.broadcast(t, src=1, group=pair)
        assert t.item() == 1
    mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("dp", "tp"))
    t = torch.tensor([float(rank)])
    dist.all_reduce(t, group=mesh["tp"].get_group())
    assert t.item() == 2 * (rank // 2 * 2) + 1
    with dist._coalescing_manager(device=torch.device("cpu")):
        a, b = torch.ones(2), torch.full((3,), float(rank))
        dist.all_reduce(a)
        dist.all_reduce(b)
    assert a.eq(size).all()
    assert b.eq(total).all()
    dist.barrier()
    dist.destroy_process_group()
    return "fine"


def test_objects_functional_p2p_subgroups_and_meshes():
    with Crew(objects_and_friends, 4, scratch_path()) as crew:
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
