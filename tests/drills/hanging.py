"""A job of three ranks of which, once one has died, another hangs before its next step: in user code."""

import os
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import ftkit
from tests.drills.training import SLOT_SIZE, SLOTS, WAITING_S, Curve, build

SEATS = 3


def main(steps: int = 60) -> None:
    torch.set_num_threads(1)
    session = ftkit.init()
    model = DistributedDataParallel(build(64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, foreach=False)
    session.protect(model=model, optimizer=optimizer)
    hung = Path(os.environ["FTKIT_RUN_DIR"], "hung")
    for step in session.steps(Curve(), slots=SLOTS, slot_size=SLOT_SIZE, until=steps):
        if session.world_size < SEATS and session.rank == 0 and not hung.exists():
            hung.touch()
            time.sleep(1e6)
        with step:
            for x, y in step.batches():
                nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
        if session.world_size < SEATS:
            time.sleep(WAITING_S)


if __name__ == "__main__":
    main()
