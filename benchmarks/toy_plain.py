"""The toy in plain DDP on gloo: the step that the two others are compared with."""

import os
import sys

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks.toy import BLOCKS, Noise, build, digest, loss_of, note, optimizer_of


def main(steps: int, rows: int) -> None:
    """Train `steps` steps on blocks of `rows` rows."""
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    model = DistributedDataParallel(build())
    optimizer = optimizer_of(model)
    data = Noise(rows)
    for step in range(1, steps + 1):
        loss = loss_of(model, data[(step * world + rank) % BLOCKS])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        note("commit", step=step)
    dist.destroy_process_group()
    note("final", params=digest(model.module))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
    # A thread of gloo's that still runs when the interpreter ends, ends the process by abort().
    sys.stdout.flush()
    os._exit(0)
