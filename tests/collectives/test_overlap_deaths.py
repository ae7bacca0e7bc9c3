"""A rank is killed inside an overlapped operation, in forward and in backward.

Four ranks play one operation. One of them is killed by SIGKILL at a byte of its own transfers in
forward, and later another in backward: every survivor's call must end with the group's error at
once, with nothing written, and be played again by those who are left.
"""

# mypy: allow-untyped-calls

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional

from ftkit.core.errors import GenerationAborted

from .crew import Crew
from .weaving import WIDTH, layers, plain
from .worlds import join, world

pytestmark = pytest.mark.multiproc

Tensor = torch.Tensor

#: Every operation below moves more than twice as much in each phase, on each rank.
FUSE_BYTES = 1500

#: On an idle machine it is 10 ms; a rank that waits is missed after half a minute.
PROMPT_S = 5.0


@dataclass
class Play:
    """One operation as a rank sees it."""

    forward: Callable[[], Tensor]
    leaves: list[Tensor]
    """What must have no gradient after a failure."""
    grad: Tensor
    """Of the output."""
    wanted: list[Tensor]
    """The output, and the gradients of the leaves."""


def random(*shapes: tuple[int, ...]) -> list[Tensor]:
    made = torch.Generator().manual_seed(5)
    return [torch.randn(shape, generator=made, dtype=torch.float64) for shape in shapes]


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().contiguous().requires_grad_()


def ours(tensor: Tensor, dim: int = 0) -> Tensor:
    from ftkit.collectives.overlap.linear import own_rows

    start, end = own_rows(tensor.shape[dim])
    return tensor.narrow(dim, start, end - start)


def whole_linear() -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Leaves, gradient of the output, and what the unsplit layer makes of them."""
    x, w, b, grad = random((240, 16), (24, 16), (24,), (240, 24))
    given = [leaf(x), leaf(w), leaf(b)]
    y = functional.linear(*given)
    y.backward(grad)
    return given, grad, [y.detach(), *(g.grad for g in given)]  # type: ignore[list-item]


def column() -> Play:
    from ftkit.collectives.overlap import all_gather_linear

    (x, w, b), grad, (y, of_x, of_w, of_b) = whole_linear()
    given = [leaf(ours(x)), leaf(ours(w)), leaf(ours(b))]
    return Play(
        lambda: all_gather_linear(*given, rows=240, chunks=2),
        given,
        ours(grad, 1),
        [ours(y, 1), ours(of_x), ours(of_w), ours(of_b)],
    )


def row() -> Play:
    from ftkit.collectives.overlap import linear_reduce_scatter

    (x, w, b), grad, (y, of_x, of_w, of_b) = whole_linear()
    given = [leaf(ours(x, 1)), leaf(ours(w, 1)), leaf(b)]
    return Play(
        lambda: linear_reduce_scatter(*given, chunks=2),
        given,
        ours(grad),
        [ours(y), ours(of_x, 1), ours(of_w, 1), of_b],
    )


def replicated() -> Play:
    """Forward sends in the second layer, backward in the first."""
    from ftkit.collectives.overlap import linear_all_reduce, linear_replicated

    x, up, down, grad = random((240, 16), (24, 16), (16, 24), (240, 16))
    whole = [leaf(x), leaf(up), leaf(down)]
    y = functional.gelu(whole[0] @ whole[1].t()) @ whole[2].t()
    y.backward(grad)
    given, second = [leaf(x), leaf(ours(up))], leaf(ours(down, 1))
    return Play(
        lambda: linear_all_reduce(
            functional.gelu(linear_replicated(*given, chunks=2)), second, chunks=2
        ),
        given,
        grad,
        [y.detach(), whole[0].grad, ours(whole[1].grad)],  # type: ignore[list-item, arg-type]
    )


def attention(route: str) -> Play:
    from ftkit.collectives.overlap import context_parallel_attention
    from ftkit.collectives.overlap.sequence import Layout

    q, k, v, grad = random((1, 4, 48, 8), (1, 2, 48, 8), (1, 2, 48, 8), (1, 4, 48, 8))
    wq, wk, wv = leaf(q), leaf(k), leaf(v)
    y = functional.scaled_dot_product_attention(wq, wk, wv, is_causal=True, enable_gqa=True)
    y.backward(grad)
    layout = Layout(48, dist.get_world_size(), zigzag=True)

    def part(tensor: Any) -> Tensor:
        return layout.take(tensor.detach(), dist.get_rank(), 2).contiguous()

    given = [leaf(part(t)) for t in (q, k, v)]
    return Play(
        lambda: context_parallel_attention(*given, is_causal=True, rotate=route, layout=layout),  # type: ignore[arg-type]
        given,
        part(grad),
        [part(y), *(part(t.grad) for t in (wq, wk, wv))],
    )


def woven() -> Play:
    from ftkit.collectives.overlap import Weave

    x, grad = random((4, 40, WIDTH), (4, 40, WIDTH))
    whole, unsplit = leaf(x), layers(0, 1, torch.float64)
    y = plain(whole, unsplit)
    y.backward(grad)
    stack, given = layers(dist.get_rank(), dist.get_world_size(), torch.float64), leaf(x)
    model = Weave(stack, split=True)
    norms = [layer.weight for layer in stack]
    wanted: list[Any] = [y.detach(), whole.grad, *(one.weight.grad for one in unsplit)]
    return Play(lambda: model(given), [given, *norms], grad, wanted)


PLAYS: dict[str, Callable[[], Play]] = {
    "column-parallel": column,
    "row-parallel": row,
    "replicated": replicated,
    "ring-kv": lambda: attention("kv"),
    "ring-bidirectional": lambda: attention("bidirectional"),
    "ring-query": lambda: attention("query"),
    "allgather": lambda: attention("allgather"),
    "woven": woven,
}


def compare(play: Play) -> None:
    y = play.forward()
    y.backward(play.grad)
    got = [y.detach(), *(t.grad for t in play.leaves)]
    for one, wanted in zip(got, play.wanted, strict=True):
        torch.testing.assert_close(one, wanted)


def two_deaths(rank, size, talk, name, transport):
    from ftkit.collectives.backend import bind, register

    register()
    group, _, addresses = join(rank, talk, transport)
    bind(group)
    dist.init_process_group(
        "ftkit", rank=rank, world_size=size, store=torch._C._distributed_c10d.HashStore()
    )
    compare(PLAYS[name]())

    def die():
        talk.say(time.monotonic())
        os.kill(os.getpid(), signal.SIGKILL)

    def until_it_ends(play, phase):
        """As the dying one, who never gets past `phase` of the first round."""
        doomed = rank == dist.get_world_size() - 1
        while True:
            for one in play.leaves:
                one.grad = None
            if doomed and phase == "forward":
                group.light_fuse(FUSE_BYTES, die)
            y = play.forward()
            if doomed and phase == "forward":
                talk.say("it outlived the forward")
            if doomed and phase == "backward":
                group.light_fuse(FUSE_BYTES, die)
            y.backward(play.grad)
            if doomed:
                talk.say("it outlived the backward")

    for generation, phase in ((2, "forward"), (3, "backward")):
        play = PLAYS[name]()
        before = [t.detach().clone() for t in play.leaves]
        # Not a barrier of the group: who leaves one early would die while others are still in it.
        talk.everyone("ready")
        last = dist.get_world_size() - 1
        with pytest.raises(GenerationAborted, match=f"member {last}"):
            until_it_ends(play, phase)
        ended = time.monotonic()
        assert all(torch.equal(a, b) for a, b in zip(before, play.leaves, strict=True))
        assert all(t.grad is None for t in play.leaves), "a failed call leaves no gradient"
        talk.say(ended)
        left = {m: a for m, a in addresses.items() if m < last}
        group.edit(world(generation, left), timeout_s=20)
        compare(PLAYS[name]())
    group.barrier().wait(10)
    dist.destroy_process_group()
    group.close()
    return "fine"


@pytest.mark.parametrize(
    ("name", "transport"),
    [
        *((name, "tcp") for name in PLAYS),
        # By reads of the memory of a process that is gone.
        *((name, "auto") for name in ("row-parallel", "ring-bidirectional", "woven")),
    ],
)
def test_a_death_ends_the_call_on_all_survivors_who_then_play_it_again(
    name: str, transport: str
) -> None:
    with Crew(two_deaths, 4, name, transport) as crew:
        crew.swap()
        for victim in (3, 2):
            crew.swap([*range(victim + 1)])
            died = crew.hear(victim)
            assert isinstance(died, float), died
            for survivor in range(victim):
                took = crew.hear(survivor) - died
                assert 0 <= took < PROMPT_S
        assert crew.results([0, 1]) == ["fine"] * 2
        for victim in (2, 3):
            crew.processes[victim].join(10)
            assert crew.processes[victim].exitcode == -signal.SIGKILL
