"""A script that knows nothing of ftkit: DDP over gloo, and one rank that goes wrong."""

import sys
import time

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

how, who = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo")
model = DistributedDataParallel(torch.nn.Linear(8, 8))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
for step in range(10_000):
    time.sleep(0.02)
    if step == 100 and dist.get_rank() == who:
        if how == "hang":
            time.sleep(10_000)
        elif how == "skip":
            dist.barrier()
    model(torch.ones(4, 8)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
