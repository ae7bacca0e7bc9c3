"""The loop in DDP on gloo, which all tools run that go back to a checkpoint; needs only torch."""

from datetime import timedelta

import torch.distributed as dist
from torch import nn
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.nn.parallel import DistributedDataParallel

from benchmarks.beside.checkpoints import Checkpoints
from benchmarks.beside.task import StepLog, Task, batch_loss
from benchmarks.toy import Noise, build, optimizer_of

#: How long ranks may take to come together, in seconds.
CONNECT_S = 60.0


def train(task: Task, log: StepLog, checkpoints: Checkpoints) -> nn.Module:
    """Train to the end from the newest checkpoint, in the group that there is. Blocks."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model = DistributedDataParallel(build())
    optimizer = optimizer_of(model)
    data = Noise(task.rows)
    done = checkpoints.restore(task, model, optimizer)
    log.begin(model, done + 1)
    for step in range(done + 1, task.steps + 1):
        blocks = task.mine(step, rank, world)
        log.attempt(step, blocks)
        batch_loss(task, model, data, blocks, world).backward()
        optimizer.step()
        optimizer.zero_grad()
        log.commit()
        if task.save_every and step % task.save_every == 0:
            checkpoints.save(task, model, optimizer, step)
        if step == done + 1:
            _limit_stalls(task)
    return model


def _limit_stalls(task: Task) -> None:
    """Give the group's collectives the task's limit, now that all ranks are connected.

    The limit that the group is made with holds for connecting too, and ranks of a busy machine need
    longer to come together than any of them should keep the others waiting later.
    """
    _set_pg_timeout(timedelta(seconds=task.stall_s), dist.group.WORLD)
