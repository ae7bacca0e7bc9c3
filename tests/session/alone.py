"""A session of one process, and a tiny model, batch for batch the same each time."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ftkit.session.parts import assemble
from ftkit.session.session import Session

SLOTS = 4


@contextlib.contextmanager
def alone() -> Iterator[Session]:
    """A session in a world of one, without a process group."""
    session = Session(assemble(None, {}))
    session.join()
    try:
        yield session
    finally:
        session.close()


class Points:
    """Sixteen points of a line; reading one draws nothing."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.tensor([float(index), 1.0])
        return x / 16, x.sum()[None] / 8


def net(seed: int = 0) -> nn.Module:
    """Two layers, one of them with dropout and batch statistics."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))


def bits(model: nn.Module) -> list[bytes]:
    """Every parameter and buffer, as bytes."""
    return [t.detach().numpy().tobytes() for t in model.state_dict().values()]


def learn(model: nn.Module, step: Any) -> None:
    """Forward and backward over this rank's batches."""
    for x, y in step.batches():
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        step.record(loss)


def train(
    steps: int = 5,
    *,
    model: nn.Module | None = None,
    meddle: Callable[[Any, nn.Module, torch.optim.Optimizer], None] | None = None,
) -> list[bytes]:
    """Train `steps` steps; `meddle` runs in every attempt before the optimizer steps."""
    model = net() if model is None else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    with alone() as session:
        session.protect(model=model, optimizer=optimizer)
        for step in session.steps(Points(), slots=SLOTS, slot_size=2, until=steps):
            with contextlib.suppress(KeyError), step:
                learn(model, step)
                if meddle is not None:
                    meddle(step, model, optimizer)
                optimizer.step()
    return bits(model)
