"""The sharded job of the drills at an even pace, with meshes that are dear to build or newcomers that are late.

A step takes `STEP_S` in a world of any size, so what a smaller world costs is what it takes to change it. Two ranks
are to be lost, the second at `SECOND_LOSS`: before that the job waits a little for the first one's replacement.
"""

import os
import sys
import time
from typing import Any

import torch
from torch import nn

import ftkit
from tests.drills.sharded import LATE, SLOT_SIZE, SLOTS, build
from tests.drills.training import Curve

#: A variable: for so many seconds a rank builds the mesh of each world but its first.
BUILD = "TEST_BUILD_S"
STEP_S = 0.04
SECOND_LOSS = 40
HOLD, HOLD_S = range(SECOND_LOSS - 10, SECOND_LOSS), 0.4


def main(steps: int) -> None:
    torch.set_num_threads(1)
    if os.environ.get("FTKIT_MEMBER") != os.environ.get("FTKIT_SEAT"):
        time.sleep(float(os.environ.get(LATE, "0")))
    session = ftkit.init()

    worlds: list[int] = []

    def slowly(mesh: Any) -> Any:
        worlds.append(mesh.size())
        if len(worlds) > 1:
            time.sleep(float(os.environ.get(BUILD, "0")))
        return build(mesh)

    session.protect(build=slowly)
    seats = int(os.environ.get("WORLD_SIZE", "1"))
    for step in session.steps(Curve(), slots=SLOTS, slot_size=SLOT_SIZE, until=steps):
        with step:
            for x, y in step.batches():
                loss = nn.functional.mse_loss(session.model(x), y)
                loss.backward()
                step.record(loss)
            step.clip_grad_norm_(0.1)
            session.optimizer.step()
            session.scheduler.step()
        waits = session.world_size < seats and step.index in HOLD
        time.sleep(HOLD_S if waits else STEP_S)


if __name__ == "__main__":
    main(int(sys.argv[1]))
