"""The task through torchft: one replica group of one process, in torchft's own environment.

python -m benchmarks.beside.with_torchft INDEX LIGHTHOUSE PORT stock|patched
"""

import sys
from datetime import timedelta

import torch.distributed as dist
import torchft  # type: ignore[import-not-found]  # only in its own environment

from benchmarks.beside.task import StepLog, Task, batch_loss, leave
from benchmarks.toy import Noise, build, optimizer_of
from benchmarks.toy_torchft import Replica, patched_hook


def main(index: int, lighthouse: str, port: int, variant: str) -> None:
    """Train. All replicas meet at `port` before the first step: nobody has to catch up."""
    task = Task.from_environ()
    if variant == "patched":
        torchft.DistributedDataParallel._comm_hook = staticmethod(patched_hook)
    plain = build()
    limit = timedelta(seconds=task.stall_s)
    replica = Replica(plain, optimizer_of(plain), index=index, lighthouse=lighthouse, timeout=limit)
    manager, model, optimizer = replica.manager, replica.model, replica.optimizer
    data = Noise(task.rows)
    log = StepLog(task, index)
    start = dist.TCPStore("127.0.0.1", port, task.slots, is_master=index == 0)  # type: ignore[attr-defined]  # public, not listed
    log.begin(model, 1)
    while manager.current_step() < task.steps:
        step = manager.current_step() + 1
        # A replica's share of the data is its own, as with torchft's sampler.
        blocks = task.mine(step, index, task.slots)
        log.attempt(step, blocks)
        optimizer.zero_grad()
        batch_loss(task, model, data, blocks, task.slots).backward()
        optimizer.step()
        if manager.current_step() == step:
            log.commit()
    log.final(plain)
    manager.shutdown()
    del start


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4])
    leave()
