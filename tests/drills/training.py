"""The job of the drills: DDP with batch statistics and dropout, a few milliseconds a step.

While a seat is empty the steps are slow, so that its next process, which imports torch
first, is back before the job ends, on a machine of any speed. While a fault of the disk is
still to come they are slow too: the disk is then hit while there are steps left.
"""

import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import ftkit
from ftkit.launch.faulty_store import VARIABLE as DISK_FAULT

SLOTS, SLOT_SIZE = 6, 4
#: What a step takes while somebody is waited for. A quarter of a minute is enough for a
#: newcomer, and for an agent's first checkpoint.
WAITING_S = 0.1


class Curve:
    """Sixty-four points of a curve."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.linspace(-1, 1, 8) * (index + 1) / 64
        return x, torch.sin(3 * x.sum())[None]


def build(width: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, width), nn.BatchNorm1d(width), nn.GELU(), nn.Dropout(0.2), nn.Linear(width, 1)
    )


def digest(*state: dict[str, Any]) -> str:
    hasher = hashlib.sha256()
    for tensors in state:
        for name, tensor in tensors.items():
            hasher.update(name.encode() + tensor.detach().cpu().numpy().tobytes())
    return hasher.hexdigest()


def disk_fault_to_come() -> bool:
    """Whether an agent is to meet a fault of its disk, and has not met it yet."""
    if DISK_FAULT not in os.environ:
        return False
    return not any(Path(os.environ["FTKIT_RUN_DIR"], "events").glob("drill-store-*.jsonl"))


def main(steps: int, flaky: str = "", width: int = 64) -> None:
    """Train; with `flaky` ranks raise an exception of their own now and then, and catch it.

    The variable TRAINING_OPTIONS has further options of the step loop, as JSON.

    The state has about 150 bytes for each unit of `width`.
    """
    torch.set_num_threads(1)
    session = ftkit.init()
    model = DistributedDataParallel(build(width))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, foreach=False)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.99)
    session.protect(model=model, optimizer=optimizer, scheduler=scheduler)
    seats = int(os.environ.get("WORLD_SIZE", "1"))
    raised: set[int] = set()
    options: Any = json.loads(os.environ.get("TRAINING_OPTIONS", "{}"))
    for step in session.steps(Curve(), slots=SLOTS, slot_size=SLOT_SIZE, until=steps, **options):
        try:
            with step:
                for x, y in step.batches():
                    loss = nn.functional.mse_loss(model(x), y)
                    loss.backward()
                    step.record(loss)
                    due = flaky and step.index % 7 == session.rank and step.index > 1
                    if due and step.index not in raised:
                        raised.add(step.index)
                        raise KeyError("of the script's own")
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
        except KeyError:
            continue
        if session.world_size < seats or disk_fault_to_come():
            time.sleep(WAITING_S)
    momenta = [{k: v for k, v in s.items() if k != "step"} for s in optimizer.state.values()]
    session.trace.event(
        "final",
        params=digest(model.module.state_dict(), *momenta),
        loss=scheduler.get_last_lr()[0],
        steps=session.step,
        raised=len(raised),
    )


if __name__ == "__main__":
    given = [*sys.argv[1:], *["0", "", "64"][len(sys.argv) - 1 :]]
    main(int(given[0]), given[1], int(given[2]))
