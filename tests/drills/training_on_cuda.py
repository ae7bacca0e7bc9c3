"""The job of the drills on GPUs, which ranks share where there are fewer of them.

Without DDP, unless it is asked for: its constructor makes a communicator of NCCL, which takes a GPU
for each rank.
"""

import os
import sys
import time
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import ftkit
from tests.drills.training import SLOT_SIZE, SLOTS, WAITING_S, Curve, build, digest


def main(steps: int, device: str, kind: str = "") -> None:
    """Train on the GPU that is this rank's; `device` may be "cpu", to try it without one.

    `kind`: "sharded" for FSDP2, "ddp".
    """
    sharded = kind == "sharded"
    if device == "cuda":
        torch.use_deterministic_algorithms(True)
        index = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
        torch.cuda.set_device(index)
    torch.set_num_threads(1)
    session = ftkit.init()

    def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=0.01, foreach=False)

    def shards(mesh: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
        from torch.distributed.fsdp import fully_shard

        whole = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Dropout(0.2), nn.Linear(64, 1))
        fully_shard(whole.to(device), mesh=mesh)
        return whole, optimizer_of(whole)

    model = build(64).to(device)
    if kind == "ddp":
        model = DistributedDataParallel(model)
    optimizer = optimizer_of(model)
    if sharded:
        session.protect(build=shards, device=device)
    else:
        session.protect(model=model, optimizer=optimizer)
    seats = int(os.environ.get("WORLD_SIZE", "1"))
    for step in session.steps(Curve(), slots=SLOTS, slot_size=SLOT_SIZE, until=steps):
        if sharded:
            model, optimizer = session.model, session.optimizer
        with step:
            for x, y in step.batches():
                loss = nn.functional.mse_loss(model(x.to(device)), y.to(device))
                loss.backward()
                step.record(loss)
            step.clip_grad_norm_(1.0)
            optimizer.step()
            optimizer.zero_grad()
        if session.world_size < seats:
            time.sleep(WAITING_S)
    assert all(p.device.type == device for p in model.parameters())
    momenta = [{k: v for k, v in s.items() if k != "step"} for s in optimizer.state.values()]
    params = session.digest() if sharded else digest(model.state_dict(), *momenta)
    session.trace.event("final", params=params, loss=0.0, steps=session.step)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
