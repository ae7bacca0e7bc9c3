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
from ray.train.torch import TorchConfig, TorchTrainer, prepare_model

from benchmarks.beside.ddp import CONNECT_S, limit_stalls
from benchmarks.beside.task import StepLog, Task, batch_loss
from benchmarks.toy import Noise, build, optimizer_of

RESTARTS = 3


def work(settings: dict[str, str]) -> None:
    """What each worker runs: as Ray's guide to fault tolerance has it, from the last report."""
    task = Task.from_environ()
    context = train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    plain = build()
    model = prepare_model(plain, move_to_device=False)
    torch.set_num_threads(1)
    optimizer = optimizer_of(model)
    data = Noise(task.rows)
    done = 0
    last = train.get_checkpoint()
    if last is not None:
        with last.as_directory() as folder:
            state = torch.load(Path(folder) / "state.pt")
        plain.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["step"]
    log = StepLog(task, rank)
    log.begin(model, done + 1)
    for step in range(done + 1, task.steps + 1):
        blocks = task.mine(step, rank, world)
        log.attempt(step, blocks)
        batch_loss(task, model, data, blocks, world).backward()
        optimizer.step()
        optimizer.zero_grad()
        log.commit()
        if step == done + 1:
            limit_stalls(task)
        if step % task.save_every:
            continue
        if rank:
            train.report({"step": step})
            continue
        with tempfile.TemporaryDirectory() as folder:
            state = {"model": plain.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**state, "step": step}, Path(folder) / "state.pt")
            train.report({"step": step}, checkpoint=Checkpoint.from_directory(folder))
    log.final(model)


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
            torch_config=TorchConfig(backend="gloo", timeout_s=int(CONNECT_S)),
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
