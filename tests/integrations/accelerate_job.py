"""A job with Accelerate: dropout, a schedule, clipping, and something registered for checkpoints.

Arguments: steps, and batches of a rank in each. While a seat is empty its steps take longer.
"""

import sys
import time
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ftkit
from ftkit.integrations.accelerate import Accelerator


class Count:
    """Steps that counted."""

    def __init__(self) -> None:
        self.steps = 0

    def state_dict(self) -> dict[str, int]:
        return {"steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.steps = state_dict["steps"]


def main(steps: int, accumulate: int) -> dict[str, Any]:
    accelerator = Accelerator(gradient_accumulation_steps=accumulate, cpu=True)
    torch.manual_seed(0)
    points = torch.randn(96, 2)
    loader = DataLoader(
        TensorDataset(points, (points.norm(dim=1) > 1.2).long()), batch_size=4, shuffle=True
    )
    model: Any = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 2))
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=0.02)
    schedule: Any = torch.optim.lr_scheduler.StepLR(optimizer, 7, gamma=0.9)
    count = Count()
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    accelerator.register_for_checkpointing(count)
    losses = []
    for step in accelerator.steps(loader, until=steps):
        with step:
            for x, y in step.batches():
                loss = nn.functional.cross_entropy(model(x), y)
                accelerator.backward(loss)
                step.record(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            count.steps += 1
        if step.committed:
            losses.append(step.loss)
        session = ftkit.init()
        if session.world_size < session.seats:
            time.sleep(0.3)
    told: dict[str, Any] = {
        "steps": count.steps,
        "rate": schedule.get_last_lr()[0],
        "first": accelerator.is_main_process,
        "last": losses[-1],
    }
    ftkit.init().trace.event("trained", **told)
    return told


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
