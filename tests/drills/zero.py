"""A job of the drills whose optimizer state is cut over the ranks: dropout, clipping, a scheduler.

While a seat is empty the steps are slow. At the end every rank tells the state it holds, row by row.
"""

import os
import sys
import time

import torch
from torch import nn

import ftkit
from tests.drills.sharded import SLOT_SIZE, SLOTS, WAITING_S, begin, network
from tests.drills.training import Curve

#: A variable: seconds that every step takes at least, so that tiers below have their time.
PAUSE = "TEST_PAUSE_S"


def main(steps: int) -> None:
    session = begin()
    torch.manual_seed(0)
    model = network()
    optimizer = ftkit.ZeroOptimizer(model.parameters(), torch.optim.AdamW, lr=0.01)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.99)
    session.protect(model=model, optimizer=optimizer, scheduler=scheduler)
    seats = int(os.environ.get("WORLD_SIZE", "1"))
    for step in session.steps(Curve(), slots=SLOTS, slot_size=SLOT_SIZE, until=steps):
        with step:
            for x, y in step.batches():
                loss = nn.functional.mse_loss(model(x), y)
                loss.backward()
                step.record(loss)
            step.clip_grad_norm_(0.1)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        time.sleep(WAITING_S if session.world_size < seats else float(os.environ.get(PAUSE, "0")))
    numbers = {id(p): number for number, p in enumerate(model.parameters())}
    rows = []
    for piece in optimizer.pieces:
        for key, value in sorted(optimizer.inner.state.get(piece.rows, {}).items()):
            for row, content in enumerate(
                value.reshape(piece.rows.shape[0], -1) if value.dim() else ()
            ):
                at = piece.box.offsets[0] + row
                told = content.contiguous().view(torch.uint8).numpy().tobytes().hex()
                rows.append([numbers[id(piece.parameter)], key, at, told])
    session.trace.event("state", rows=rows, held=len(optimizer.held))


if __name__ == "__main__":
    main(int([*sys.argv[1:], "40"][0]))
