"""A job whose ranks meet inside the model: linears, attention and woven layers of overlapped operations.

Every rank holds the whole model and computes a part of it, by the world that there is. Some kill
themselves at a byte of what they move for one of the operations.
"""

import os
import signal
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

import ftkit
from ftkit.collectives.overlap import (
    Layer,
    Weave,
    all_gather_linear,
    context_parallel_attention,
    linear_reduce_scatter,
)
from ftkit.collectives.overlap.linear import own_rows
from ftkit.collectives.overlap.sequence import Layout
from tests.drills.training import Curve

BATCH, TOKENS, WIDTH, HIDDEN, HEADS = 4, 12, 16, 24, 2
SEATS, STEPS, RATE = 5, 13, 0.1

#: Who dies when, and in which operation.
DEATHS = {3: (5, "linear forward"), 2: (7, "attention backward"), 1: (9, "weave backward")}
FUSE_BYTES = 700

Tensor = torch.Tensor
Fuse = Callable[[str], None]


def ours(whole: Tensor, dim: int = 0) -> Tensor:
    start, end = own_rows(whole.shape[dim])
    return whole.narrow(dim, start, end - start)


class Part(nn.Module):
    """An MLP, of which a rank computes its part of the hidden."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(HIDDEN, WIDTH) * 0.2)
        self.down = nn.Parameter(torch.randn(WIDTH, HIDDEN) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        return functional.gelu(x @ ours(self.up).t()) @ ours(self.down, 1).t()

    def plain(self, x: Tensor) -> Tensor:
        return functional.gelu(x @ self.up.t()) @ self.down.t()


class Net(nn.Module):
    """Float64, so that what ranks add in another order cannot be taken for a fault."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mlp = Part()
        self.qkv = nn.Parameter(torch.randn(3 * WIDTH, WIDTH) * 0.2)
        self.layers = [Layer(torch.ones(WIDTH), Part()) for _ in range(2)]
        self.stack = Weave(self.layers, split=True)
        for layer in self.layers:
            # Its gradient is that of all tokens on all ranks, and would count once a rank.
            layer.weight.requires_grad_(False)
        self.double()

    def forward(self, x: Tensor, fuse: Fuse) -> Tensor:
        """This rank's term of the loss."""
        rows = x.flatten(0, 1)
        fuse("linear forward")
        hidden = all_gather_linear(ours(rows), ours(self.mlp.up), rows=len(rows), chunks=2)
        down = ours(self.mlp.down, 1)
        y = linear_reduce_scatter(functional.gelu(hidden), down, chunks=2)
        q, k, v = (y @ self.qkv.t()).view(1, len(y), 3, HEADS, -1).transpose(1, 3).unbind(2)
        layout = Layout(len(rows), dist.get_world_size())
        seen = context_parallel_attention(q, k, v, rotate="bidirectional", layout=layout)
        woven = self.stack(x)
        seen.register_hook(lambda _: fuse("attention backward"))
        woven.register_hook(lambda _: fuse("weave backward"))
        loss: Tensor = seen.square().sum() / rows.numel() + woven.square().mean()
        return loss

    def plain(self, x: Tensor) -> Tensor:
        """The same on one rank, without any of it."""
        rows = x.flatten(0, 1)
        y = self.mlp.plain(rows)
        q, k, v = (y @ self.qkv.t()).view(1, len(y), 3, HEADS, -1).transpose(1, 3).unbind(2)
        seen = functional.scaled_dot_product_attention(q, k, v)
        for layer in self.layers:
            assert isinstance(layer.body, Part)
            x = x + layer.body.plain(functional.rms_norm(x, (WIDTH,), layer.weight, 1e-6))
        return seen.square().sum() / rows.numel() + x.square().mean()


def batch(step: int) -> Tensor:
    made = torch.Generator().manual_seed(step)
    return torch.randn(BATCH, TOKENS, WIDTH, generator=made, dtype=torch.float64)


def trained() -> list[Tensor]:
    """The parameters of an undisturbed run."""
    model = Net()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        model.plain(batch(step)).backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def main() -> None:
    torch.set_num_threads(1)
    session = ftkit.init()
    model = Net()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    session.protect(model=model, optimizer=optimizer)
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    doom = DEATHS.get(session.seat) if first else None

    for step in session.steps(Curve(), slots=SEATS, slot_size=1, until=STEPS, mean=False):

        def fuse(where: str, index: int = step.index) -> None:
            if doom == (index, where):
                session.trace.event("doomed", step=index, where=where)
                group = dist.group.WORLD.group  # type: ignore[union-attr]
                group.light_fuse(FUSE_BYTES, lambda: os.kill(os.getpid(), signal.SIGKILL))

        with step:
            # Ranks have different numbers of slots, and all have a first one.
            for number, _ in enumerate(step.batches()):
                if number == 0:
                    model(batch(step.index), fuse).backward()
            optimizer.step()
    told = [p.detach().flatten().tolist() for p in model.parameters()]
    session.trace.event("parameters", values=told)


if __name__ == "__main__":
    main()
