"""What a rank of `beside_training` runs: DDP whose computing sleeps, through ftkit or plain.

plain STEPS     gloo, torchrun's variables; prints {"times": [...]}, monotonic seconds at each step's end
waiting STEPS   the same with a hook that waits for each bucket, and a vote
ftkit STEPS     under an agent; its events are the job's
"""

import json
import os
import sys
import time

import torch
import torch.distributed as dist
from torch.utils.data import Dataset

import ftkit
from benchmarks.sleeping import play, sleeping, waiting_hook


class Nothing(Dataset[torch.Tensor]):
    """Samples that nobody looks at."""

    def __len__(self) -> int:
        return 1 << 20

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.zeros(1)


def through_ftkit(steps: int) -> None:
    """One slot a rank."""
    session = ftkit.init()
    model = sleeping()
    optimizer = _optimizer(model)
    session.protect(model=model, optimizer=optimizer)
    for step in session.steps(Nothing(), slots=session.world_size, slot_size=1, until=steps):
        with step:
            for _ in step.batches():
                play(model)
            optimizer.step()
            optimizer.zero_grad()


def plain(steps: int, *, waiting: bool) -> None:
    """On gloo."""
    dist.init_process_group("gloo")
    model = sleeping()
    if waiting:
        model.register_comm_hook(None, waiting_hook)
    optimizer, times = _optimizer(model), list[float]()
    for _ in range(steps):
        play(model)
        if waiting:
            dist.all_reduce(torch.ones(1))
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.monotonic())
    dist.destroy_process_group()
    print(json.dumps({"times": times}))


def _optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, foreach=False)


def main(argv: list[str]) -> None:
    """Train."""
    torch.set_num_threads(1)
    way, steps = argv[0], int(argv[1])
    if way == "ftkit":
        through_ftkit(steps)
        return
    plain(steps, waiting=way == "waiting")
    # A thread of gloo's that still runs when the interpreter ends, ends the process by abort().
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
