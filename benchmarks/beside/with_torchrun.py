"""The task in plain DDP, and in DDP with DCP checkpoints under torchrun: the same script.

Without `save_every` nothing is saved: the step that all others are compared with.
"""

import os
from datetime import timedelta

import torch.distributed as dist

from benchmarks.beside.checkpoints import ByDCP
from benchmarks.beside.ddp import CONNECT_S, train
from benchmarks.beside.task import StepLog, Task, leave


def main() -> None:
    """Train; started with torchrun's variables."""
    task = Task.from_environ()
    dist.init_process_group("gloo", timeout=timedelta(seconds=CONNECT_S))
    log = StepLog(task, int(os.environ["RANK"]))
    log.final(train(task, log, ByDCP()))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    leave()
