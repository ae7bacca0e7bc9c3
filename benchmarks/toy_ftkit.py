"""The toy through ftkit: run by `ftkit run`; its events are the job's own."""

import sys

import torch
from torch.nn.parallel import DistributedDataParallel

import ftkit
from benchmarks.toy import Noise, build, digest, loss_of, optimizer_of
from benchmarks.training import Noted


def main(steps: int, rows: int, slots: int) -> None:
    """Train `steps` steps; a slot is one block of `rows` rows."""
    session = Noted(ftkit.init())
    model = DistributedDataParallel(build())
    optimizer = optimizer_of(model)
    session.protect(model=model, optimizer=optimizer)
    for step in session.steps(
        Noise(rows), slots=slots, slot_size=1, until=steps, collate=torch.cat
    ):
        with step:
            for block in step.batches():
                loss_of(model, block).backward()
            optimizer.step()
            optimizer.zero_grad()
    session.trace.event("final", params=digest(model.module), loss=None, step=steps)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]))
