"""A small DDP job on Ray Train: two workers, each with two ranks that ftkit looks after.

Runs on the Ray cluster at RAY_ADDRESS, or on one that it starts on this machine. While it trains,
kill a rank or a worker.
"""

import ftkit
import torch
from ftkit.integrations import ray_train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils import data


def train(config):
    session = ftkit.init()
    torch.manual_seed(0)
    points = torch.randn(4096, 2)
    dataset = data.TensorDataset(points, (points.norm(dim=1) > 1.2).long())
    model = DistributedDataParallel(nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 2)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=config["lr"])
    loss_fn = nn.CrossEntropyLoss()

    session.protect(model=model, optimizer=optimizer)
    for step in session.steps(dataset, slots=8, slot_size=4, until=config["steps"]):
        with step:
            for x, y in step.batches():
                loss = loss_fn(model(x), y)
                loss.backward()
                step.record(loss)
            optimizer.step()
            optimizer.zero_grad()
        if step.committed:
            ray_train.report({"step": step.index, "loss": step.loss})

    right = (model.module(points).argmax(dim=1) == dataset.tensors[1]).float().mean()
    print(f"accuracy {right.item():.3f}")


def main():
    trainer = TorchTrainer(
        ray_train.in_ranks(train),
        train_loop_config={"lr": 1e-2, "steps": 3000},
        torch_config=ray_train.FtkitConfig(nproc=2),
        scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 0.5}),
        run_config=RunConfig(failure_config=FailureConfig(max_failures=-1)),
    )
    trainer.fit()


if __name__ == "__main__":
    main()
