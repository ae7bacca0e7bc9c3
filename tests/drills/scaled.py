"""A job with `consistency="scaled"`: dropout, clipping, an uneven batch; its parameters and samples told.

While a seat is empty the steps are slow, so that its next process is back before the job ends.
"""

import os
import sys
import time
from typing import Any

import torch
from torch import nn

import ftkit
from tests.drills.training import Curve

#: 21 samples: nothing that ranks divide, in micro-batches of 3 at most.
SLOTS, SLOT_SIZE, STEPS = 7, 3, 40
WAITING_S = 0.15


class Numbered(Curve):
    """Points that say which they are."""

    def __getitem__(self, index: int) -> Any:
        return (*super().__getitem__(index), index)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 10), nn.Dropout(0.2), nn.GELU(), nn.Linear(10, 1))


def build(mesh: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    from torch.distributed.fsdp import fully_shard

    model = network()
    for layer in (model[0], model[3]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def main(sharded: bool) -> None:
    torch.set_num_threads(1)
    session = ftkit.init()
    model: nn.Module = network()
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    if sharded:
        session.protect(build=build, consistency="scaled", device="cpu")
    else:
        session.protect(model=model, optimizer=optimizer, consistency="scaled")
    seats = int(os.environ.get("WORLD_SIZE", "1"))
    for step in session.steps(Numbered(), slots=SLOTS, slot_size=SLOT_SIZE, until=STEPS):
        if sharded:
            model, optimizer = session.model, session.optimizer
        read, generation = [list[int]()], session.generation
        with step:
            for x, y, index in step.batches():
                read.append(index.tolist())
                loss = nn.functional.mse_loss(model(x), y)
                loss.backward()
                step.record(loss)
            step.clip_grad_norm_(0.1)
            optimizer.step()
        if step.committed:
            session.trace.event("read", step=step.index, generation=generation, batches=read)
        if session.world_size < seats:
            time.sleep(WAITING_S)
    held: list[Any] = list(model.parameters())
    whole = [p.full_tensor() if sharded else p for p in held]
    told = torch.cat([p.detach().flatten() for p in whole]).tolist()
    session.trace.event("parameters", values=told)


if __name__ == "__main__":
    main(sys.argv[1] == "sharded")
