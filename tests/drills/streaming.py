"""A job that reads from a stream which says where it stands, and tells what each rank read of it."""

import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

import ftkit
from ftkit.session.session import Session
from tests.drills.training import WAITING_S, digest

SLOTS = 3


class Stream:
    """Fifty batches an epoch, each drawn from where it lies."""

    def __init__(self) -> None:
        self.at = 0
        self.read: list[int] = []

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            self.at += 1
            self.read.append(self.at)
            x = torch.rand(4, 8, generator=torch.Generator().manual_seed(self.at))
            yield x, x.sum(dim=1, keepdim=True).sin()
            if self.at % 50 == 0:
                return

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


def train(session: Session, stream: Stream, steps: int, seats: int) -> str:
    """Train to step `steps`; gives a hash of the model and the optimizer's state."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.2), nn.Linear(16, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, foreach=False)
    session.protect(model=model, optimizer=optimizer)
    for step in session.steps(stream, slots=SLOTS, until=steps):
        with step:
            for x, y in step.batches():
                loss = nn.functional.mse_loss(model(x), y)
                loss.backward()
                step.record(loss)
            optimizer.step()
        if session.world_size < seats:
            time.sleep(WAITING_S)
    momenta = [{k: v for k, v in s.items() if k != "step"} for s in optimizer.state.values()]
    return digest(model.state_dict(), *momenta)


if __name__ == "__main__":
    torch.set_num_threads(1)
    rank, given = ftkit.init(), Stream()
    params = train(rank, given, int(sys.argv[1]), rank.seats)
    rank.trace.event("final", params=params, loss=None, steps=rank.step, read=given.read)
