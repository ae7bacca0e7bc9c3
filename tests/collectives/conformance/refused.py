"""Cases that must fail: wrong shapes, dtypes, counts, roots, tags. All at the call."""

# mypy: allow-untyped-calls
# mypy: disable-error-code="attr-defined,arg-type"

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.distributed as dist

from .case import Case, Side

Calls = dict[str, Callable[[Side], object]]


def cases(size: int) -> Iterator[Case]:
    for name, run in {**_GATHERS, **_REDUCTIONS, **_TO_ALL, **_ROOTED, **_P2P}.items():
        yield Case(name, partial(nothing_of, run))


def nothing_of(run, side: Side):
    run(side)


def f(*shape):
    return torch.zeros(shape)


def i(*shape):
    return torch.zeros(shape, dtype=torch.int64)


def many(side, tensor, more=0):
    return [tensor.clone() for _ in range(side.size + more)]


_GATHERS: Calls = {
    "all_gather into too few": lambda s: s.call(dist.all_gather, many(s, f(3), -1), f(3)),
    "all_gather into too many": lambda s: s.call(dist.all_gather, many(s, f(3), 1), f(3)),
    "all_gather into none": lambda s: s.call(dist.all_gather, [], f(3)),
    "all_gather into shorter": lambda s: s.call(dist.all_gather, many(s, f(2)), f(3)),
    "all_gather into longer": lambda s: s.call(dist.all_gather, many(s, f(4)), f(3)),
    "all_gather into same bytes": lambda s: s.call(dist.all_gather, many(s, f(2, 3)), f(6)),
    "all_gather into another dtype": lambda s: s.call(dist.all_gather, many(s, i(3)), f(3)),
    "all_gather of what is no tensor": lambda s: s.call(dist.all_gather, many(s, f(3)), [1.0]),
    "all_gather on meta": lambda s: s.call(
        dist.all_gather, many(s, torch.zeros(3, device="meta")), torch.zeros(3, device="meta")
    ),
    "all_gather of sparse": lambda s: s.call(
        dist.all_gather, many(s, f(3).to_sparse()), f(3).to_sparse()
    ),
    "all_gather_single into shorter": lambda s: s.call(
        dist.all_gather_single, f(3 * s.size - 1), f(3)
    ),
    "all_gather_single into longer": lambda s: s.call(
        dist.all_gather_single, f(3 * s.size + 1), f(3)
    ),
    "all_gather_single into another dtype": lambda s: s.call(
        dist.all_gather_single, i(3 * s.size), f(3)
    ),
    "all_gather_single into half the bytes": lambda s: s.call(
        dist.all_gather_single, f(6 * s.size), i(3)
    ),
    "gather into too few": lambda s: at(s, 0, dist.gather, f(3), many(s, f(3), -1), 0),
    "gather into shorter": lambda s: at(s, 0, dist.gather, f(3), many(s, f(2)), 0),
    "gather into another dtype": lambda s: at(s, 0, dist.gather, f(3), many(s, i(3)), 0),
    "gather into nothing at the root": lambda s: at(s, 0, dist.gather, f(3), None, 0),
    "gather into something elsewhere": lambda s: at(s, 1, dist.gather, f(3), many(s, f(3)), 0),
    "scatter of too few": lambda s: at(s, 0, dist.scatter, f(3), many(s, f(3), -1), 0),
    "scatter of longer": lambda s: at(s, 0, dist.scatter, f(3), many(s, f(4)), 0),
    "scatter of another dtype": lambda s: at(s, 0, dist.scatter, f(3), many(s, i(3)), 0),
    "scatter of nothing at the root": lambda s: at(s, 0, dist.scatter, f(3), None, 0),
    "scatter of something elsewhere": lambda s: at(s, 1, dist.scatter, f(3), many(s, f(3)), 0),
}

_REDUCTIONS: Calls = {
    "all_reduce of nothing": lambda s: s.call(dist.all_reduce, None),
    "all_reduce of a list": lambda s: s.call(dist.all_reduce, [f(3)]),
    "all_reduce on meta": lambda s: s.call(dist.all_reduce, torch.zeros(3, device="meta")),
    "all_reduce premultiplied": lambda s: s.call(
        dist.all_reduce, f(3), dist._make_nccl_premul_sum(2.0)
    ),
    "reduce on meta": lambda s: s.call(dist.reduce, torch.zeros(3, device="meta"), 0),
    "reduce_scatter of too few": lambda s: s.call(dist.reduce_scatter, f(3), many(s, f(3), -1)),
    "reduce_scatter of too many": lambda s: s.call(dist.reduce_scatter, f(3), many(s, f(3), 1)),
    "reduce_scatter of longer": lambda s: s.call(dist.reduce_scatter, f(3), many(s, f(4))),
    "reduce_scatter of another dtype": lambda s: s.call(dist.reduce_scatter, f(3), many(s, i(3))),
    "reduce_scatter_single of longer": lambda s: s.call(
        dist.reduce_scatter_single, f(3), f(3 * s.size + 1)
    ),
    "reduce_scatter_single of shorter": lambda s: s.call(
        dist.reduce_scatter_single, f(3), f(3 * s.size - 1)
    ),
    "reduce_scatter_single of double": lambda s: s.call(
        dist.reduce_scatter_single, f(3), f(6 * s.size)
    ),
    "reduce_scatter_single of another dtype": lambda s: s.call(
        dist.reduce_scatter_single, f(6), i(3 * s.size)
    ),
}

_TO_ALL: Calls = {
    "all_to_all of too few": lambda s: s.call(dist.all_to_all, many(s, f(3), -1), many(s, f(3))),
    "all_to_all into too few": lambda s: s.call(dist.all_to_all, many(s, f(3)), many(s, f(3), -1)),
    "all_to_all of two dtypes": lambda s: s.call(dist.all_to_all, many(s, f(3)), many(s, i(3))),
    "all_to_all_single indivisible": lambda s: s.call(
        dist.all_to_all_single, f(3 * s.size + 1), f(3 * s.size + 1)
    ),
    "all_to_all_single of another dtype": lambda s: s.call(
        dist.all_to_all_single, f(2 * s.size), i(s.size)
    ),
    "all_to_all_single splits too few": lambda s: s.call(
        dist.all_to_all_single, f(s.size), f(s.size), [1] * (s.size - 1), [1] * s.size
    ),
    "all_to_all_single splits of other rows": lambda s: s.call(
        dist.all_to_all_single, f(s.size), f(s.size), [1] * s.size, [2] * s.size
    ),
    "all_to_all_single negative splits": lambda s: s.call(
        dist.all_to_all_single, f(0), f(0), [-1, 1, *[0] * (s.size - 2)], [0] * s.size
    ),
}

_ROOTED: Calls = {
    "broadcast from nobody": lambda s: s.call(dist.broadcast, f(3), s.size),
    "broadcast from minus one": lambda s: s.call(dist.broadcast, f(3), -1),
    "broadcast of sparse": lambda s: s.call(dist.broadcast, f(3).to_sparse(), 0),
    "reduce to nobody": lambda s: s.call(dist.reduce, f(3), s.size),
    "gather to nobody": lambda s: s.call(dist.gather, f(3), None, s.size),
    "scatter from nobody": lambda s: s.call(dist.scatter, f(3), None, s.size),
    "broadcast of nothing": lambda s: s.call(dist.broadcast, None, 0),
}

_P2P: Calls = {
    "isend to nobody": lambda s: dist.isend(f(3), s.size, group=s.group),
    "irecv from nobody": lambda s: dist.irecv(f(3), s.size, group=s.group),
    "isend with a negative tag": lambda s: dist.isend(f(3), (s.rank + 1) % s.size, s.group, -1),
    "irecv with a negative tag": lambda s: dist.irecv(f(3), (s.rank + 1) % s.size, s.group, -1),
    "isend on meta": lambda s: dist.isend(
        torch.zeros(3, device="meta"), (s.rank + 1) % s.size, s.group
    ),
    "isend of sparse": lambda s: dist.isend(f(3).to_sparse(), (s.rank + 1) % s.size, s.group),
    "isend of no tensor": lambda s: dist.isend([1], (s.rank + 1) % s.size, s.group),
    "batch of nothing": lambda s: dist.batch_isend_irecv([]),
    "batch of other calls": lambda s: dist.batch_isend_irecv(
        [dist.P2POp(dist.broadcast, f(1), (s.rank + 1) % s.size, s.group)]
    ),
}


def at(side, rank, function, *args):
    """Make the wrong call at one rank alone: it fails before anybody else is needed."""
    if side.rank == rank:
        side.call(function, *args)
