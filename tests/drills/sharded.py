"""A sharded job of the drills: FSDP2 with dropout and clipping, a few milliseconds a step.

While a seat is empty the steps are slow, so that its next process is back before the job ends.
"""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import ftkit
from ftkit.session.session import Session
from ftkit.session.step import Step
from tests.drills.training import Curve

#: Neither 2, 3 nor 4 ranks divide it.
SLOTS, SLOT_SIZE, STEPS = 7, 2, 40
WAITING_S = 0.15

#: A variable: for so many seconds who comes in a lost one's place does nothing, not even say hello.
LATE = "TEST_LATE_S"


def network() -> nn.Sequential:
    """Sizes that ranks do not divide, at 4 some have no part of the last bias."""
    return nn.Sequential(nn.Linear(8, 10), nn.Dropout(0.2), nn.GELU(), nn.Linear(10, 1))


def build(mesh: Any) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    from torch.distributed.fsdp import fully_shard

    fail = Path(os.environ["FTKIT_RUN_DIR"], f"fail-{os.environ['RANK']}")
    if mesh.size() < int(os.environ["WORLD_SIZE"]) and fail.exists():
        fail.unlink()
        raise RuntimeError("of the script's own, while it builds")
    model = network()
    for layer in (model[0], model[3]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return model, optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.99)


def begin() -> Session:
    """Join the job; in a lost one's place, late."""
    torch.set_num_threads(1)
    if os.environ.get("FTKIT_MEMBER") != os.environ.get("FTKIT_SEAT"):
        time.sleep(float(os.environ.get(LATE, "0")))
    return ftkit.init()


def steps(session: Session, until: int) -> Iterator[Step]:
    """Train; gives every step when it has been played."""
    for step in session.steps(Curve(), slots=SLOTS, slot_size=SLOT_SIZE, until=until):
        with step:
            for x, y in step.batches():
                loss = nn.functional.mse_loss(session.model(x), y)
                loss.backward()
                step.record(loss)
            step.clip_grad_norm_(0.1)
            session.optimizer.step()
            session.scheduler.step()
        yield step


def main(shards: int, until: int) -> None:
    session = begin()
    session.protect(build=build, shards=shards or None, device="cpu")
    for _ in steps(session, until):
        if session.world_size < session.seats:
            time.sleep(WAITING_S)


if __name__ == "__main__":
    given = [*sys.argv[1:], *["0", str(STEPS)][len(sys.argv) - 1 :]]
    main(int(given[0]), int(given[1]))
