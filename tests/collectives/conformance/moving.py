"""Cases that move without arithmetic: broadcast, the gathers, scatter, all_to_all."""

# mypy: allow-untyped-calls

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from . import inputs
from .case import Case, Side


def cases(size: int) -> Iterator[Case]:
    for dtype in inputs.DTYPES:
        yield from every_call(size, dtype, (7,), "plain")
        yield from every_call(size, dtype, (3, 0), "plain")
    for shape in inputs.SHAPES:
        yield from every_call(size, torch.float32, shape, "plain")
    for layout in inputs.LAYOUTS:
        for shape in [(6,), (3, 5), (2, 3, 4, 5)]:
            yield from every_call(size, torch.float32, shape, layout)
    for name, counts in SPLITS.items():
        for trailing in [(), (3,), (0,)]:
            yield Case(f"all_to_all_single {name} {trailing}", partial(splits, counts, trailing))
    for rows in [0, 1, 4]:
        yield Case(f"all_to_all uneven {rows}", partial(uneven_lists, rows))
    for shape in [(0,), (2, 0), (5,), (3, 2)]:
        yield Case(f"all_gather_single stacked {shape}", partial(gather_stacked, shape))


def every_call(size, dtype, shape, layout):
    runs: dict[str, Callable[..., Any]] = {
        f"broadcast from {root}": partial(broadcast, root) for root in range(size)
    }
    runs |= {
        f"gather to {size - 1}": partial(gather, size - 1),
        f"scatter from {size - 1}": partial(scatter, size - 1),
        "all_gather": all_gather,
        "all_gather_single": gather_into,
        "all_to_all": all_to_all,
        "all_to_all_single": all_to_all_single,
    }
    for name, run in runs.items():
        yield Case(
            f"{name} {dtype} {shape} {layout}",
            partial(run, dtype, shape, layout),
            translated=dtype in inputs.WIDER,
        )


def broadcast(root, dtype, shape, layout, side: Side):
    tensor = side.make(dtype, shape, layout)
    side.call(dist.broadcast, tensor, root)
    return tensor


def gather(root, dtype, shape, layout, side: Side):
    mine = side.make(dtype, shape, layout)
    outs = None
    if side.rank == root:
        outs = [side.blank(dtype, shape, layout) for _ in range(side.size)]
    side.call(dist.gather, mine, outs, root)
    return mine, outs


def scatter(root, dtype, shape, layout, side: Side):
    out, ins = side.blank(dtype, shape, layout), None
    if side.rank == root:
        ins = [side.make(dtype, shape, layout, salt=r) for r in range(side.size)]
    side.call(dist.scatter, out, ins, root)
    return out, ins


def all_gather(dtype, shape, layout, side: Side):
    mine = side.make(dtype, shape, layout)
    outs = [side.blank(dtype, shape, layout) for _ in range(side.size)]
    side.call(dist.all_gather, outs, mine)
    return mine, outs


def gather_into(dtype, shape, layout, side: Side):
    mine = side.make(dtype, shape, layout)
    whole = side.blank(dtype, long(shape, side.size), layout)
    side.call(dist.all_gather_single, whole, mine)
    return mine, whole


def gather_stacked(shape, side: Side):
    whole = side.blank(torch.float32, (side.size, *shape))
    side.call(dist.all_gather_single, whole, side.make(torch.float32, shape))
    return whole


def all_to_all(dtype, shape, layout, side: Side):
    ins = [side.make(dtype, shape, layout, salt=r) for r in range(side.size)]
    outs = [side.blank(dtype, shape, layout) for _ in range(side.size)]
    side.call(dist.all_to_all, outs, ins)
    return ins, outs


def uneven_lists(rows, side: Side):
    """Rank i sends `rows * i + j` rows to rank j."""
    me = side.rank
    ins = [side.make(torch.float32, (rows * me + j, 2), salt=j) for j in range(side.size)]
    outs = [side.blank(torch.float32, (rows * i + me, 2)) for i in range(side.size)]
    side.call(dist.all_to_all, outs, ins)
    return outs


def all_to_all_single(dtype, shape, layout, side: Side):
    source = side.make(dtype, long(shape, side.size), layout)
    out = side.blank(dtype, long(shape, side.size), layout)
    side.call(dist.all_to_all_single, out, source)
    return source, out


#: rows that rank i sends to rank j
SPLITS = {
    "even": lambda i, j: 2,
    "growing": lambda i, j: i + j,
    "one way": lambda i, j: 3 * (i < j),
    "to rank 0": lambda i, j: 4 * (j == 0),
    "nothing": lambda i, j: 0,
    "large": lambda i, j: 20_000 * (i + 1),
}


def splits(counts, trailing, side: Side):
    to = [counts(side.rank, j) for j in range(side.size)]
    come = [counts(i, side.rank) for i in range(side.size)]
    source = side.make(torch.float32, (sum(to), *trailing))
    out = side.blank(torch.float32, (sum(come), *trailing))
    side.call(dist.all_to_all_single, out, source, come, to)
    return out


def long(shape, size):
    """`size` times as many rows."""
    return (size * shape[0], *shape[1:]) if shape else (size,)
