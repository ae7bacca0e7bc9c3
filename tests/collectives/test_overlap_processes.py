"""Overlapped operations over real process groups: as DTensor's own, and through a death."""

# torch's stubs know neither what a default group is nor DTensor's parameters.
# mypy: allow-untyped-calls
# mypy: disable-error-code="index,comparison-overlap,arg-type,union-attr,attr-defined,assignment"

import pytest
import torch
import torch.distributed as dist

from ftkit.core.errors import GenerationAborted, UsageError

from .crew import Crew
from .scratch import scratch_path
from .worlds import join, world

pytestmark = pytest.mark.multiproc


def block():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(12, 20), torch.nn.GELU(), torch.nn.Linear(20, 12))


def styles_like_dtensors_own(rank, size, talk, path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    from ftkit.collectives.backend import register
    from ftkit.collectives.overlap.styles import Colwise, Rowwise

    register()
    store = dist.FileStore(path, size)
    dist.init_process_group("ftkit", store=store, rank=rank, world_size=size)
    mesh = init_device_mesh("cpu", (size,))
    x = torch.randn(2, 6, 12, generator=torch.Generator().manual_seed(1))
    for outside in (Replicate(), Shard(1)):
        given = x if isinstance(outside, Replicate) else x.chunk(size, 1)[rank].contiguous()
        got = []
        for column, row in ((ColwiseParallel, RowwiseParallel), (Colwise, Rowwise)):
            model = parallelize_module(
                block(),
                mesh,
                {"0": column(input_layouts=outside), "2": row(output_layouts=outside)},
            )
            leaf = given.clone().requires_grad_()
            y = model(leaf)
            y.square().sum().backward()
            got.append([y, leaf.grad, *(p.grad.full_tensor() for p in model.parameters())])
            assert [p.placements for p in model.parameters()] == [
                (Shard(0),), (Shard(0),), (Shard(1),), (Replicate(),),
            ]  # fmt: skip
        for theirs, ours in zip(*got, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    over_gloo(rank, size, x)
    dist.destroy_process_group()
    return "fine"


def over_gloo(rank, size, x):
    """A receive of gloo's must be waited for once: a second wait is for another message."""
    from ftkit.collectives.overlap import context_parallel_attention, linear_reduce_scatter
    from ftkit.collectives.overlap.traffic import TrafficGovernor

    gloo = dist.new_group(backend="gloo")
    whole, rows = block()[0], x[0]
    inner = rows.shape[1] // size
    ours = slice(rank * inner, (rank + 1) * inner)
    got = linear_reduce_scatter(
        rows[:, ours], whole.weight[:, ours], whole.bias, group=gloo, chunks=2
    )
    torch.testing.assert_close(got, whole(rows).chunk(size)[rank])
    q = x.view(1, 2, 6, 12)
    part = q.chunk(size, 2)[rank].contiguous().requires_grad_()
    out = context_parallel_attention(part, part, part, group=gloo)
    wanted = torch.nn.functional.scaled_dot_product_attention(q, q, q).chunk(size, 2)[rank]
    torch.testing.assert_close(out, wanted)
    out.sum().backward()
    assert part.grad.isfinite().all()
    woven(x.view(2, 6, -1), gloo)
    with pytest.raises(UsageError, match="gloo does not tell"):
        TrafficGovernor(gloo)


def woven(x, group):
    """Each rank's part is the whole layer over the number of ranks."""
    from torch.nn.functional import rms_norm

    from ftkit.collectives.overlap import Layer, Weave

    width = x.shape[-1]
    bodies = [torch.nn.Linear(width, width, bias=False) for _ in range(3)]
    leaf, wanted = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = wanted
    for body in bodies:
        torch.nn.init.normal_(body.weight, 0.0, 0.1, generator=torch.Generator().manual_seed(4))
        y = y + body(rms_norm(y, (width,), None, 1e-6)) * group.size()
    layers = [Layer(torch.ones(width), body) for body in bodies]
    out = Weave(layers, group=group, split=True)(leaf)
    torch.testing.assert_close(out, y, rtol=1e-4, atol=1e-4)
    out.sum().backward()
    y.sum().backward()
    torch.testing.assert_close(leaf.grad, wanted.grad, rtol=1e-4, atol=1e-3)


def test_the_styles_do_what_dtensors_own_do():
    with Crew(styles_like_dtensors_own, 2, scratch_path()) as crew:
        assert crew.results() == ["fine"] * 2


def a_death_in_the_middle(rank, size, talk):
    from ftkit.collectives.backend import bind, register
    from ftkit.collectives.overlap.modules import ColumnParallelLinear, RowParallelLinear

    register()
    group, _, addresses = join(rank, talk, "tcp")
    bind(group)
    dist.init_process_group(
        "ftkit", rank=rank, world_size=size, store=torch._C._distributed_c10d.HashStore()
    )
    whole = block()
    x = torch.randn(600, 12, generator=torch.Generator().manual_seed(1))

    def step():
        up = ColumnParallelLinear.of(whole[0], chunks=4)
        down = RowParallelLinear.of(whole[2], chunks=4)
        part = x.chunk(dist.get_world_size())[dist.get_rank()]
        y = down(torch.nn.functional.gelu(up(part)))
        y.square().sum().backward()
        gathered = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, y.detach())
        return torch.cat(gathered)

    wanted = whole(x).detach()
    torch.testing.assert_close(step(), wanted)
    if rank == size - 1:
        # Its peers are in the middle of a call that it has begun as well.
        group.light_fuse(20_000, lambda: __import__("os")._exit(9))

    def until_it_ends():
        while True:
            step()

    with pytest.raises(GenerationAborted, match="member 2"):
        until_it_ends()
    group.edit(world(2, {m: a for m, a in addresses.items() if m < size - 1}), timeout_s=20)
    torch.testing.assert_close(step(), wanted)
    group.barrier().wait(10)
    dist.destroy_process_group()
    group.close()
    return "fine"


def test_a_death_ends_the_call_everywhere_and_the_step_is_played_again():
    with Crew(a_death_in_the_middle, 3) as crew:
        crew.swap()
        assert crew.results([0, 1]) == ["fine"] * 2
