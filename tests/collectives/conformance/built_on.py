"""Cases of what torch builds on collectives: objects, functional forms, autograd, coalescing."""

# mypy: allow-untyped-calls
# mypy: disable-error-code="arg-type,attr-defined"

from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as fc
import torch.distributed.nn.functional as differentiable

from .case import Case, Side

Runs = dict[str, Callable[[Side], object]]


def cases(size: int) -> Iterator[Case]:
    for name, run in {**_OBJECTS, **_FUNCTIONAL, **_GRADIENTS, **_COALESCED, **_WORKS}.items():
        yield Case(name, run)


def plain(side, *shape):
    return side.make(torch.float32, shape)


# -- objects --------------------------------------------------------------------------------


def everybodys(side):
    got = [None] * side.size
    dist.all_gather_object(got, {"rank": side.rank, "pad": "x" * 5_000 * side.rank}, side.group)
    return [str(g) for g in got]


def roots_list(side):
    box = [side.rank, "from", [side.rank] * 3]
    dist.broadcast_object_list(box, src=1, group=side.group)
    return [str(b) for b in box]


def at_the_root(side):
    got = [None] * side.size if side.rank == 1 else None
    dist.gather_object(("g", side.rank), got, dst=1, group=side.group)
    return str(got)


def one_each(side):
    mine = [None]
    out = [f"to {r}" * (r + 1) for r in range(side.size)] if side.rank == 0 else None
    dist.scatter_object_list(mine, out, src=0, group=side.group)
    return mine


def sent_objects(side):
    if side.rank == 0:
        return dist.send_object_list([{"a": 1}, "b"], 1, side.group)
    got = [None, None]
    if side.rank == 1:
        dist.recv_object_list(got, 0, side.group)
    return [str(g) for g in got]


_OBJECTS: Runs = {
    "all_gather_object": everybodys,
    "broadcast_object_list": roots_list,
    "gather_object": at_the_root,
    "scatter_object_list": one_each,
    "send_object_list": sent_objects,
}

# -- functional -----------------------------------------------------------------------------


def functional_all_reduce(op, side: Side):
    return fc.all_reduce(plain(side, 7), op, side.group)


_FUNCTIONAL: Runs = {
    **{
        f"functional all_reduce {op}": partial(functional_all_reduce, op)
        for op in ("sum", "product", "min", "max", "avg")
    },
    "functional all_gather_tensor": lambda s: fc.all_gather_tensor(plain(s, 2, 3), 0, s.group),
    "functional all_gather_tensor on 1": lambda s: fc.all_gather_tensor(plain(s, 2, 3), 1, s.group),
    "functional reduce_scatter_tensor": lambda s: fc.reduce_scatter_tensor(
        plain(s, 2 * s.size, 3), "sum", 0, s.group
    ),
    "functional reduce_scatter_tensor on 1": lambda s: fc.reduce_scatter_tensor(
        plain(s, 3, 2 * s.size), "sum", 1, s.group
    ),
    "functional broadcast": lambda s: fc.broadcast(plain(s, 7), 1, s.group),
    "functional all_to_all_single": lambda s: fc.all_to_all_single(
        plain(s, 2 * s.size), None, None, s.group
    ),
    "functional all_to_all_single uneven": lambda s: fc.all_to_all_single(
        plain(s, s.size * (s.rank + 1)),
        [r + 1 for r in range(s.size)],
        [s.rank + 1] * s.size,
        s.group,
    ),
    "functional all_reduce_coalesced": lambda s: fc.all_reduce_coalesced(
        [plain(s, 3), plain(s, 4, 2)], "sum", s.group
    ),
    "functional all_gather_into_tensor_coalesced": lambda s: fc.all_gather_into_tensor_coalesced(
        [plain(s, 3), plain(s, 4, 2)], s.group
    ),
    "functional reduce_scatter_tensor_coalesced": lambda s: fc.reduce_scatter_tensor_coalesced(
        [plain(s, 3 * s.size), plain(s, s.size, 2)], "sum", [0, 0], s.group
    ),
    "functional permute_tensor": lambda s: fc.permute_tensor(
        plain(s, 5), [(r + 1) % s.size for r in range(s.size)], s.group
    ),
}

# -- gradients through collectives -----------------------------------------------------------


def gradient_of(function):
    """What comes out, and what flows back to the input from a loss that tells ranks apart."""

    def run(side):
        leaf = plain(side, 2 * side.size, 3).requires_grad_()
        out = function(side, leaf)
        outs = [out] if isinstance(out, torch.Tensor) else [o for o in out if o is not None]
        loss = sum((o * (i + 1 + side.rank)).pow(2).sum() for i, o in enumerate(outs))
        loss.backward()
        return [o.detach() for o in outs], leaf.grad

    return run


_GRADIENTS: Runs = {
    "autograd all_reduce": gradient_of(
        lambda s, x: differentiable.all_reduce(x * 1, group=s.group)
    ),
    "autograd all_gather": gradient_of(lambda s, x: differentiable.all_gather(x, group=s.group)),
    "autograd broadcast": gradient_of(
        lambda s, x: differentiable.broadcast(x * 1, 0, group=s.group)
    ),
    "autograd reduce_scatter": gradient_of(
        lambda s, x: differentiable.reduce_scatter(
            torch.empty(2, 3), list((x * 1).chunk(s.size)), group=s.group
        )
    ),
    "autograd all_to_all_single": gradient_of(
        lambda s, x: differentiable.all_to_all_single(torch.empty_like(x), x * 1, group=s.group)
    ),
    "autograd all_to_all": gradient_of(
        lambda s, x: differentiable.all_to_all(
            [torch.empty(2, 3) for _ in range(s.size)], list((x * 1).chunk(s.size)), group=s.group
        )
    ),
    "autograd gather": gradient_of(lambda s, x: differentiable.gather(x * 1, dst=0, group=s.group)),
    "autograd functional all_gather": gradient_of(
        lambda s, x: fc.all_gather_tensor_autograd(x, 0, s.group)
    ),
    "autograd functional reduce_scatter": gradient_of(
        lambda s, x: fc.reduce_scatter_tensor_autograd(x, "sum", 0, s.group)
    ),
    "autograd functional all_to_all_single": gradient_of(
        lambda s, x: fc.all_to_all_single_autograd(x, None, None, s.group)
    ),
}

# -- coalesced --------------------------------------------------------------------------------


def coalesced(function, *, device=None, later=False):
    def run(side):
        with dist._coalescing_manager(side.group, device, async_ops=later) as manager:
            outs = function(side)
        if later:
            side.place = "wait"
            manager.wait()
        return outs

    return run


def several_sums(side):
    tensors = [plain(side, n) for n in (3, 0, 5, 20_000)]
    for tensor in tensors:
        dist.all_reduce(tensor, group=side.group)
    return tensors


def several_gathers(side):
    wholes = [torch.zeros(n * side.size) for n in (3, 5)]
    for whole, n in zip(wholes, (3, 5), strict=True):
        dist.all_gather_single(whole, plain(side, n), group=side.group)
    return wholes


def several_scatters(side):
    outs = [torch.zeros(n) for n in (3, 5)]
    for out in outs:
        dist.reduce_scatter_single(out, plain(side, side.size * len(out)), group=side.group)
    return outs


def two_kinds(side):
    several_sums(side)
    return several_gathers(side)


_COALESCED: Runs = {
    "coalesced all_reduce": coalesced(several_sums),
    "coalesced all_reduce later": coalesced(several_sums, later=True),
    "coalesced all_gather_single": coalesced(several_gathers, later=True),
    "coalesced reduce_scatter_single": coalesced(several_scatters, later=True),
    "coalesced all_reduce on a device": coalesced(
        several_sums, device=torch.device("cpu"), later=True
    ),
    "coalesced nothing": coalesced(lambda s: None),
    "coalesced two kinds": coalesced(two_kinds),
    "all_reduce_coalesced": lambda s: _old(s, "all_reduce_coalesced"),
}


def _old(side, name):
    tensors = [plain(side, 3), plain(side, 2, 2)]
    getattr(dist, name)(tensors, group=side.group)
    return tensors


# -- works and barriers ------------------------------------------------------------------------


def life_of_a_work(side):
    tensor = plain(side, 5)
    work = dist.all_reduce(tensor, group=side.group, async_op=True)
    waited = work.wait()
    return waited, work.is_completed(), work.is_success(), tensor


def future_of_a_work(side):
    tensor = plain(side, 5)
    work = dist.all_reduce(tensor, group=side.group, async_op=True)
    return work.get_future().then(lambda f: f.value()[0] * 2).wait()


def futures_of_a_gather(side):
    outs = [torch.zeros(3) for _ in range(side.size)]
    work = dist.all_gather(outs, plain(side, 3), group=side.group, async_op=True)
    value = work.get_future().wait()
    return value, outs


def barriers(side):
    dist.barrier(side.group)
    work = dist.barrier(side.group, async_op=True)
    return work.wait()


_WORKS: Runs = {
    "the life of a work": life_of_a_work,
    "the future of a work": future_of_a_work,
    "the future of a gather": futures_of_a_gather,
    "wait with a timeout": lambda s: dist.all_reduce(
        plain(s, 5), group=s.group, async_op=True
    ).wait(timedelta(seconds=30)),
    "barrier": barriers,
}
