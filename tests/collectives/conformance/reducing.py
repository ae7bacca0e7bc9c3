"""Cases that reduce: all_reduce, reduce, reduce_scatter in three forms, over dtype, op and shape."""

# mypy: allow-untyped-calls

from collections.abc import Iterator
from functools import partial

import torch
import torch.distributed as dist

from . import inputs
from .case import Case, Side

R = dist.ReduceOp
OPS = {
    "sum": R.SUM,
    "product": R.PRODUCT,
    "min": R.MIN,
    "max": R.MAX,
    "band": R.BAND,
    "bor": R.BOR,
    "bxor": R.BXOR,
    "avg": R.AVG,
}


def cases(size: int) -> Iterator[Case]:
    yield from every_dtype_and_op()
    yield from every_shape_and_layout(size)
    yield from rounding(size)
    for name, reduction in OPS.items():
        yield Case(f"all_reduce sparse {name}", partial(all_reduce_sparse, reduction, 4))
    for entries in (0, 1, 900):
        yield Case(f"all_reduce sparse {entries}", partial(all_reduce_sparse, R.SUM, entries))
    for name, special in SPECIAL.items():
        for op in ["sum", "product", "min", "max"]:
            # Three of the largest numbers overflow in one order and not in another.
            if name != "largest" or size == 2:
                yield Case(f"all_reduce {op} {name}", partial(all_reduce_of, special, OPS[op]))


def every_dtype_and_op() -> Iterator[Case]:
    for dtype in inputs.DTYPES:
        for name, op in OPS.items():
            for call, run in CALLS.items():
                yield Case(
                    f"{call} {name} {dtype}",
                    partial(run, dtype, op, (7,)),
                    translated=dtype == torch.int16,
                )


def every_shape_and_layout(size: int) -> Iterator[Case]:
    for dtype in [torch.float32, torch.bfloat16, torch.int64]:
        for shape in inputs.SHAPES:
            for call, run in CALLS.items():
                # gloo ends the process on an output without dimensions.
                if shape or call != "reduce_scatter_single":
                    yield Case(f"{call} {dtype} {shape}", partial(run, dtype, R.SUM, shape))
            for root in range(size - 1):
                yield Case(
                    f"reduce to {root} {dtype} {shape}",
                    partial(reduce, dtype, R.SUM, shape, root=root),
                )
    for layout in inputs.LAYOUTS:
        for shape in [(6,), (3, 5), (2, 3, 4, 5)]:
            for call, run in CALLS.items():
                yield Case(
                    f"{call} {layout} {shape}",
                    partial(run, torch.float32, R.SUM, shape, layout=layout),
                )


def rounding(size: int) -> Iterator[Case]:
    """Numbers of any size. Sums of two are rounded once; of three, the order shows."""
    for dtype in inputs.REAL:
        kind = "real" if dtype.is_floating_point else "wide"
        for name in ["sum", "product", "min", "max"]:
            ordered = dtype.is_floating_point and name in ("sum", "product")
            for run in (all_reduce, scatter_single):
                yield Case(
                    f"{run.__name__} {kind} {name} {dtype}",
                    partial(run, dtype, OPS[name], (30_001,), kind=kind),
                    ulps=size - 1 if ordered and size > 2 else 0,
                )


#: What rank 0, and what all others bring.
SPECIAL = {
    "infinities": ([torch.inf, -torch.inf, torch.inf], [1.0, 1.0, torch.inf]),
    "signed zeros": ([-0.0, -0.0], [-0.0, 1.0]),
    "largest": ([3e38, -3e38], [3e38, 3e38]),
    "subnormal": ([1e-40, 1e-42], [1e-40, 0.5]),
    "not a number": ([torch.nan, 1.0, torch.nan], [1.0, torch.nan, torch.nan]),
}


def all_reduce(dtype, op, shape, side: Side, layout="plain", kind="whole"):
    tensor = side.make(dtype, shape, layout, kind=kind)
    side.call(dist.all_reduce, tensor, op)
    return tensor


def all_reduce_of(special, op, side: Side):
    tensor = torch.tensor(special[min(side.rank, 1)])
    side.call(dist.all_reduce, tensor, op)
    return tensor


def all_reduce_sparse(op, entries, side: Side):
    """Entries at places of each rank's own, some of them twice; rank 1 has none."""
    count = entries * (side.rank != 1)
    rows = (torch.arange(count) * (side.rank + 2)) % 50
    values = side.make(torch.float32, (count, 3))
    tensor = torch.sparse_coo_tensor(rows[None], values, (50, 3), check_invariants=True)
    side.call(dist.all_reduce, tensor, op)
    return tensor.coalesce().indices(), tensor.coalesce().values()


def reduce(dtype, op, shape, side: Side, layout="plain", root=-1):
    root %= side.size
    tensor = side.make(dtype, shape, layout)
    side.call(dist.reduce, tensor, root, op)
    # gloo leaves partial sums at the others; ours stay as they were.
    return tensor if side.rank == root else None


def reduce_scatter(dtype, op, shape, side: Side, layout="plain"):
    ins = [side.make(dtype, shape, layout, salt=r) for r in range(side.size)]
    out = side.blank(dtype, shape, layout)
    side.call(dist.reduce_scatter, out, ins, op)
    return out, ins


def scatter_single(dtype, op, shape, side: Side, layout="plain", kind="whole"):
    long = (side.size * shape[0], *shape[1:])
    whole = side.make(dtype, long, layout, kind=kind)
    out = side.blank(dtype, shape, layout)
    side.call(dist.reduce_scatter_single, out, whole, op)
    return out, whole


CALLS = {
    "all_reduce": all_reduce,
    "reduce": reduce,
    "reduce_scatter": reduce_scatter,
    "reduce_scatter_single": scatter_single,
}
