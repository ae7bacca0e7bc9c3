"""A small FSDP2 job; fsdp_plain.py and fsdp_elastic.py differ by what ftkit asks for.

The plain one runs under torchrun and `ftkit run`, the other under `ftkit run`.
"""

import logging
import os

import ftkit
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils import data

logger = logging.getLogger("example")


def build(mesh):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 2))
    fully_shard(model, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def main():
    session = ftkit.init()
    logging.basicConfig(
        format="%(message)s", level="INFO" if os.environ["RANK"] == "0" else "ERROR"
    )
    torch.manual_seed(0)
    points = torch.randn(4096, 2)
    dataset = data.TensorDataset(points, (points.norm(dim=1) > 1.2).long())

    session.protect(build=build, device="cpu")
    loss_fn = nn.CrossEntropyLoss()

    for step in session.steps(dataset, slots=8, slot_size=4, until=300):
        model, optimizer = session.model, session.optimizer
        with step:
            for x, y in step.batches():
                loss = loss_fn(model(x), y)
                loss.backward()
                step.record(loss)
            step.clip_grad_norm_(1.0)
            optimizer.step()
            optimizer.zero_grad()
        logger.info("loss %s", step.loss if step.committed else "none: played again")

    right = (session.model.eval()(points).argmax(dim=1) == dataset.tensors[1]).float().mean()
    logger.info("accuracy %.3f", right.item())


if __name__ == "__main__":
    main()
