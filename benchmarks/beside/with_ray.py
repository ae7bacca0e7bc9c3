"""The task through Ray Train, on a cluster of its own that ends with it: the driver and its workers.

python -m benchmarks.beside.with_ray TEMP SHM
"""

import sys
import tempfile
from pathlib import Path

import ray
import torch
from ray import train
from ray.train import Checkpoint, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from torch import nn, optim

from benchmarks.beside import ddp
from benchmarks.beside.task import StepLog, Task

RESTARTS = 3


class ByReports:
    """As Ray's guide to fault tolerance has it: rank 0 reports one, and training goes on from it."""

    def restore(self, task: Task, model: nn.Module, optimizer: optim.Optimizer) -> int:
        """The newest that was reported."""
        last = train.get_checkpoint()
        if last is None:
            return 0
        with last.as_directory() as folder:
            state = torch.load(Path(folder) / "state.pt")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        return int(state["step"])

    def save(self, task: Task, model: nn.Module, optimizer: optim.Optimizer, step: int) -> None:
        """Report what is there after `step`."""
        if train.get_context().get_world_rank():
            train.report({"step": step})
            return
        with tempfile.TemporaryDirectory() as folder:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**state, "step": step}, Path(folder) / "state.pt")
            train.report({"step": step}, checkpoint=Checkpoint.from_directory(folder))


def work(settings: dict[str, str]) -> None:
    """What each worker runs, in the group that Ray Train has made."""
    task = Task.from_environ()
    torch.set_num_threads(1)
    log = StepLog(task, train.get_context().get_world_rank())
    log.final(ddp.train(task, log, ByReports()))


def main(temp: str, shm: str) -> None:
    """Start a cluster, train, end both."""
    task = Task.from_environ()
    ray.init(
        address="local",
        num_cpus=task.slots + 1,
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        _temp_dir=temp,
        _plasma_directory=shm,
        log_to_driver=False,
    )
    try:
        TorchTrainer(
            work,
            train_loop_config={},
            torch_config=TorchConfig(backend="gloo", timeout_s=int(ddp.CONNECT_S)),
            scaling_config=ScalingConfig(num_workers=task.slots),
            run_config=RunConfig(
                name="task",
                storage_path=str(Path(task.folder) / "storage"),
                failure_config=FailureConfig(max_failures=RESTARTS),
            ),
        ).fit()
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
