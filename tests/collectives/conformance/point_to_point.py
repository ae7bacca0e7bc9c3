"""Cases of send and receive: pairs, rings, tags, from anybody, batches; every dtype and shape."""

# mypy: allow-untyped-calls
# mypy: disable-error-code="arg-type,union-attr"

from collections.abc import Iterator
from functools import partial

import torch
import torch.distributed as dist

from . import inputs
from .case import Case, Side


def cases(size: int) -> Iterator[Case]:
    for dtype in inputs.DTYPES:
        yield Case(f"ring {dtype} (7,)", partial(ring, dtype, (7,), "plain"))
    for shape in inputs.SHAPES:
        yield Case(f"ring {torch.float32} {shape}", partial(ring, torch.float32, shape, "plain"))
    for layout in inputs.LAYOUTS:
        what = f"{torch.float32} {layout}"
        yield Case(f"ring {what}", partial(ring, torch.float32, (4, 6), layout))
        yield Case(f"blocking {what}", partial(blocking, torch.float32, (4, 6), layout))
        yield Case(f"batch {what}", partial(batch, torch.float32, (4, 6), layout))
    yield Case("batch large", partial(batch, torch.float32, (70_001,), "plain"))
    yield Case("tags out of order", tags_out_of_order)
    yield Case("same tag in order", same_tag_in_order)
    yield Case("from anybody", partial(from_anybody, 0))
    yield Case("from anybody with a tag", partial(from_anybody, 11))
    yield Case("from anybody, large", partial(from_anybody, 3, n=70_001))
    yield Case("a receive and a collective", receive_round_a_collective)
    yield Case("the work of a receive", work_of_a_receive)


def neighbours(side):
    return (side.rank + 1) % side.size, (side.rank - 1) % side.size


def ring(dtype, shape, layout, side: Side):
    """Everybody sends to the next: neither may wait for the other to be first."""
    after, before = neighbours(side)
    out, mine = side.blank(dtype, shape, layout), side.make(dtype, shape, layout)
    works = [dist.isend(mine, after, side.group), dist.irecv(out, before, side.group)]
    side.place = "wait"
    for work in works:
        work.wait()
    return out, mine


def blocking(dtype, shape, layout, side: Side):
    out = side.blank(dtype, shape, layout)
    if side.rank == 0:
        dist.send(side.make(dtype, shape, layout), 1, side.group)
        return dist.recv(out, 1, side.group), out
    if side.rank == 1:
        source = dist.recv(out, 0, side.group)
        dist.send(side.make(dtype, shape, layout), 0, side.group)
        return source, out
    return None


def batch(dtype, shape, layout, side: Side):
    after, before = neighbours(side)
    mine = side.make(dtype, shape, layout)
    outs = [side.blank(dtype, shape, layout) for _ in range(2)]
    works = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.irecv, outs[0], before, side.group, 1),
            dist.P2POp(dist.isend, mine, after, side.group, 1),
            dist.P2POp(dist.irecv, outs[1], after, side.group, 2),
            dist.P2POp(dist.isend, mine, before, side.group, 2),
        ]
    )
    for work in works:
        work.wait()
    return outs


def tags_out_of_order(side: Side):
    if side.rank == 0:
        works = [dist.isend(torch.full((2,), float(t)), 1, side.group, t) for t in (5, 6, 7)]
        return [work.wait() for work in works]
    if side.rank == 1:
        outs = [torch.zeros(2) for _ in range(3)]
        for out, tag in zip(outs, (7, 5, 6), strict=True):
            dist.recv(out, 0, side.group, tag)
        return outs
    return None


def same_tag_in_order(side: Side):
    if side.rank == 0:
        works = [dist.isend(torch.full((n,), float(n)), 1, side.group) for n in (1, 5_000, 3)]
        return [work.wait() for work in works]
    if side.rank == 1:
        outs = [torch.zeros(n) for n in (1, 5_000, 3)]
        works = [dist.irecv(out, 0, side.group) for out in outs]
        return [work.wait() for work in works], outs
    return None


def from_anybody(tag, side: Side, n=3):
    if side.rank:
        return dist.isend(torch.full((n,), float(side.rank)), 0, side.group, tag).wait()
    came = []
    for _ in range(side.size - 1):
        out = torch.zeros(n)
        source = dist.recv(out, None, side.group, tag)
        came.append((source, out.unique().tolist()))
    return sorted(came)


def receive_round_a_collective(side: Side):
    """A receive posted before a collective, its send after it."""
    after, before = neighbours(side)
    out = torch.zeros(3)
    work = dist.irecv(out, before, side.group)
    total = torch.ones(5)
    dist.all_reduce(total, group=side.group)
    dist.send(torch.full((3,), float(side.rank)), after, side.group)
    work.wait()
    return out, total


def work_of_a_receive(side: Side):
    after, before = neighbours(side)
    out = torch.zeros(3)
    sent = dist.isend(torch.ones(3), after, side.group)
    work = dist.irecv(out, before, side.group)
    return work.wait(), work.is_completed(), work._source_rank(), sent.wait()
