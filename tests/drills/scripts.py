"""Scripts that go wrong, each in one way: what `mode` names.

Few steps and no DDP: what is looked at is how the job ends.
"""

import os
import sys
from typing import Any

if sys.argv[1] == "early":
    sys.exit(3)

import torch
from torch import nn
from torch.utils.data import DataLoader

import ftkit

STEPS = 30


class Line:
    """Twelve points."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([float(index)])


class RankDependent:
    """A loader that shards by rank, as a DistributedSampler does."""

    def __iter__(self) -> Any:
        rank = int(os.environ["RANK"])
        return iter([torch.tensor([float(rank), i]) for i in range(8)])


def main(mode: str) -> None:
    session = ftkit.init()
    width = {"sharded": 2, "huge": 4_000_000}.get(mode, 1)
    model = nn.Linear(width, 1)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    session.protect(model=model, optimizer=optimizer)
    source: Any = Line()
    if mode == "sharded":
        source = RankDependent()
    if mode == "shuffled":
        source = DataLoader(source, batch_size=2, shuffle=True)
    size = None if mode in ("sharded", "shuffled") else 2
    for step in session.steps(source, slots=4, slot_size=size, until=STEPS):
        with step:
            for batch in step.batches():
                x = batch.expand(-1, width) if mode == "huge" else batch.reshape(-1, width)
                model(x).square().mean().backward()
                if mode == "bug" and step.index == 4 and session.rank == 0:
                    raise ZeroDivisionError("the same every time")
            optimizer.step()


if __name__ == "__main__":
    main(sys.argv[1])
