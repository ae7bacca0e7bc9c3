"""A run of Ray Train in which a rank and then a worker are killed, and which then grows; or the same
training alone.

Arguments: the folder for what comes of it, and "faults" or "alone". Whoever starts it with faults adds
a machine to the cluster when there is a file `full`.
"""

import json
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from ftkit.integrations import ray_train

STEPS = 60
RANK_DIES, WORKER_DIES = 15, 30
#: Where the first job stands, and waits for a machine more.
GROWS = 45
#: One worker for each CPU.
ELASTIC: dict[str, Any] = {
    "num_workers": (2, 3),
    "resources_per_worker": {"CPU": 1},
    "elastic_resize_monitor_interval_s": 1.0,
}
#: Ranks of the first job.
SEATS = 4
#: What a step takes while somebody is waited for, who is then back before the end: Ray starts a
#: worker in seconds, of which there is one for each step that is left.
WAITING_S = 1.0


def train(config: dict[str, Any]) -> None:
    import ftkit

    folder, faults = Path(config["folder"]), config["faults"]
    session = ftkit.init()
    torch.manual_seed(0)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
    dataset = torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True))
    session.protect(model=model, optimizer=optimizer)
    for step in session.steps(dataset, slots=8, slot_size=2, until=STEPS):
        for at, seat in ((RANK_DIES, 1), (WORKER_DIES, 2)):
            mark = folder / f"killed-{at}"
            if faults and step.index == at and session.seat == seat and not mark.exists():
                mark.touch()
                # Of seat 2 the whole worker, in which its agent lives.
                os.kill(os.getpid() if at == RANK_DIES else os.getppid(), signal.SIGKILL)
                time.sleep(60)
        if faults and session.seats == SEATS and step.index == GROWS:
            (folder / "full").touch()
            time.sleep(600)
        with step:
            for a, b in step.batches():
                loss = (model(a) - b).square().mean()
                loss.backward()
                step.record(loss)
            optimizer.step()
            optimizer.zero_grad()
        if step.committed and step.loss is not None:  # rolled forward: others know the loss
            ray_train.report({"step": step.index, "loss": step.loss})
        if faults and session.world_size < session.seats:
            time.sleep(WAITING_S)
    told = {
        "parameters": [p.detach().flatten().tolist() for p in model.parameters()],
        "loss": step.loss,
    }
    (folder / f"seat-{session.seat}.json").write_text(json.dumps(told))


def main(folder: Path) -> None:
    # Not at the top, as ranks and the one that is alone need none of it.
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    ray.init(address=os.environ["RAY_ADDRESS"], logging_level=logging.ERROR)
    trainer = TorchTrainer(
        ray_train.in_ranks(train),
        train_loop_config={"folder": str(folder), "faults": True},
        torch_config=ray_train.FtkitConfig(nproc=2, run_dir=str(folder / "runs")),
        scaling_config=ScalingConfig(**ELASTIC),
        run_config=RunConfig(
            storage_path=str(folder / "storage"), failure_config=FailureConfig(max_failures=3)
        ),
    )
    trainer.fit()


if __name__ == "__main__":
    if sys.argv[2] == "alone":
        train({"folder": sys.argv[1], "faults": False})
    else:
        main(Path(sys.argv[1]))
