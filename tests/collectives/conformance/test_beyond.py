"""What ours does and gloo does not (`known`), checked against plain arithmetic."""

# mypy: allow-untyped-calls
# mypy: disable-error-code="index,comparison-overlap,arg-type,union-attr,attr-defined"

import pytest
import torch
import torch.distributed as dist

from tests.collectives.crew import Crew
from tests.collectives.scratch import scratch_path

from . import inputs

pytestmark = pytest.mark.multiproc
R = dist.ReduceOp


def beyond(rank, size, talk, path):
    from ftkit.collectives.backend import register

    register()
    dist.init_process_group("ftkit", store=dist.FileStore(path, size), rank=rank, world_size=size)

    def everybodys(dtype, shape):
        return [inputs.make(dtype, shape, r) for r in range(size)]

    for dtype in [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]:
        all_, mine = everybodys(dtype, (9,)), inputs.make(dtype, (9,), rank)
        dist.all_reduce(mine, R.AVG)
        total = torch.stack(all_).long().sum(0)
        assert torch.equal(mine, total.div(size, rounding_mode="trunc").to(dtype))
    for dtype in [torch.complex64, torch.complex128]:
        all_, mine = everybodys(dtype, (9,)), inputs.make(dtype, (9,), rank)
        dist.reduce(mine, 0, R.PRODUCT)
        assert rank or torch.equal(mine, torch.stack(all_).prod(0))
        outs = [torch.zeros(9, dtype=dtype) for _ in range(size)] if rank == 0 else None
        dist.gather(inputs.make(dtype, (9,), rank), outs, 0)
        assert rank or all(map(torch.equal, outs, all_))
    sparse = torch.eye(4)[rank : rank + 2].to_sparse()
    dist.all_reduce(sparse, R.AVG)
    expected = sum(torch.eye(4)[r : r + 2] for r in range(size)) / size
    assert torch.equal(sparse.to_dense(), expected)
    for op in (R.MIN, R.MAX):
        mine = torch.tensor([torch.nan, 1.0] if rank == 0 else [1.0, torch.nan])
        dist.all_reduce(mine, op)
        assert mine.isnan().all()
    for shape in [(), (0,), (5,), (3, 2)]:
        whole = torch.zeros(size, *shape)
        dist.all_gather_single(whole, inputs.make(torch.float32, shape, rank))
        assert torch.equal(whole, torch.stack(everybodys(torch.float32, shape)))
    out = torch.zeros(())
    dist.reduce_scatter_single(out, torch.arange(float(size)))
    assert out == rank * size
    # rank i sends i + 2 j rows to rank j
    outs = [torch.zeros(i + 2 * rank, 2) for i in range(size)]
    dist.all_to_all(outs, [torch.full((rank + 2 * j, 2), 1.0 * rank) for j in range(size)])
    assert all(o.eq(i).all() for i, o in enumerate(outs))
    # gathered pieces may be as long as their rank says
    outs = [torch.zeros(r + 1) for r in range(size)]
    dist.all_gather(outs, torch.full((rank + 1,), 1.0 * rank))
    assert all(o.eq(r).all() for r, o in enumerate(outs))
    into, work = torch.zeros(3), None
    work = dist.irecv(into, rank)
    dist.isend(torch.ones(3), rank).wait()
    work.wait()
    assert into.eq(1).all(), "a message to ourselves arrives"
    refusals(rank, size)
    dist.barrier()
    dist.destroy_process_group()
    return "right"


def refusals(rank, size):
    """What nobody could do right is refused at the call; the group goes on."""
    from ftkit.core.errors import Refused

    with pytest.raises(Refused, match=r"7 rows cannot be divided evenly"):
        dist.all_to_all_single(torch.zeros(7), torch.zeros(7))
    with pytest.raises(Refused, match="share their memory"):
        dist.all_reduce(torch.zeros(1).expand(6))
    with pytest.raises(Refused, match=f"no rank {size} in a group of {size}"):
        dist.broadcast(torch.zeros(1), size)
    with pytest.raises(Refused, match="tag"):
        dist.isend(torch.zeros(1), (rank + 1) % size, tag=-1)
    tensor = torch.ones(1)
    dist.all_reduce(tensor)
    assert tensor == size


@pytest.mark.parametrize("size", [3])
def test_what_gloo_lacks_is_right(size):
    with Crew(beyond, size, scratch_path()) as crew:
        assert crew.results() == ["right"] * size
