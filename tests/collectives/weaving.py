"""Layers to weave, small and sharded, and how they are woven on a modelled network."""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ftkit.collectives.modelled import ModelledGroup, Network
from ftkit.collectives.overlap.weave import Layer, Weave

WIDTH, HEADS, HIDDEN = 12, 6, 24


class Attention(nn.Module):
    """Some heads of causal attention; their part of the output projection."""

    def __init__(self, into: torch.Tensor, out: torch.Tensor) -> None:
        super().__init__()
        self.into, self.out = nn.Parameter(into), nn.Parameter(out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        width = WIDTH // HEADS
        q, k, v = functional.linear(x, self.into).unflatten(-1, (3, -1, width)).movedim(2, 0)
        y = functional.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
        )
        return functional.linear(y.transpose(1, 2).flatten(2), self.out)


class Mlp(nn.Module):
    """Some of the hidden units; their part of the output."""

    def __init__(self, up: torch.Tensor, down: torch.Tensor) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(up), nn.Parameter(down)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(functional.gelu(functional.linear(x, self.up)), self.down)


def layers(rank: int, size: int, dtype: torch.dtype) -> list[Layer]:
    """Two blocks, of which each rank has some heads and some of the hidden."""
    made = torch.Generator().manual_seed(2)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=made, dtype=torch.float64).to(dtype) * 0.3

    found = []
    for _ in range(2):
        into, out = random(3, HEADS, WIDTH // HEADS, WIDTH), random(WIDTH, HEADS, WIDTH // HEADS)
        heads = slice(rank * HEADS // size, (rank + 1) * HEADS // size)
        attention = Attention(
            into[:, heads].flatten(0, 2).clone(), out[:, heads].flatten(1).clone()
        )
        up, down = random(HIDDEN, WIDTH), random(WIDTH, HIDDEN)
        hidden = slice(rank * HIDDEN // size, (rank + 1) * HIDDEN // size)
        found += [
            Layer(1 + random(WIDTH), attention),
            Layer(1 + random(WIDTH), Mlp(up[hidden].clone(), down[:, hidden].clone())),
        ]
    return found


def plain(x: torch.Tensor, stack: list[Layer]) -> torch.Tensor:
    """What one rank computes that has all heads and all of the hidden."""
    for layer in stack:
        x = x + layer.body(functional.rms_norm(x, (WIDTH,), layer.weight, 1e-6))
    return x


class Beside:
    """What is done aside on a modelled network: a thread that has entered it."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._last: Any = None

    def submit(self, act: Callable[[], Any]) -> Any:
        one = self._last = _Doing(self._network, act, self._last)
        return one

    def shutdown(self) -> None:
        pass


class _Doing:
    def __init__(self, network: Network, act: Callable[[], Any], before: Any) -> None:
        self._network, self._done = network, network.event()
        self._value: Any = None
        self._error: BaseException | None = None
        network.enter()

        def run() -> None:
            try:
                if before is not None:
                    network.wait(before._done)
                self._value = act()
            except BaseException as error:  # noqa: BLE001 - raised where it is waited for
                self._error = error
            finally:
                network.happened(self._done)
                network.leave()

        threading.Thread(target=run, daemon=True).start()

    def result(self) -> Any:
        self._network.wait(self._done)
        if self._error is not None:
            raise self._error
        return self._value


def woven(group: ModelledGroup, stack: list[Layer], split: Any) -> Weave:
    """The stack on one rank of a modelled network, by the network's clock."""
    network = group.network
    return Weave(stack, group=group, split=split, clock=network.now, aside=lambda: Beside(network))
