"""One rank of two: everything torch does with a gloo group, with the group recorded."""

import json
import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from ftkit.collectives import recorded


class Notes:
    """A recorder that keeps what it is told."""

    def __init__(self) -> None:
        self.entered: list[tuple[int, int, str, int]] = []
        self.left: list[tuple[int, int]] = []

    def enter(self, group: int, seq: int, op: str, nbytes: int) -> None:
        self.entered.append((group, seq, op, nbytes))

    def leave(self, group: int, seq: int, ok: bool) -> None:
        assert ok
        self.left.append((group, seq))

    def awaiting(self, group: int, seq: int, members: object) -> None:
        raise AssertionError("gloo does not say whom it waits for")


def train(model: torch.nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        model(torch.ones(2, 8)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def main() -> None:
    notes = Notes()
    assert recorded.install(lambda: notes)
    dist.init_process_group(
        "gloo", init_method=f"file://{sys.argv[1]}", rank=int(sys.argv[2]), world_size=2
    )
    ones = torch.ones(8)
    dist.all_reduce(ones)
    assert ones[0] == 2
    dist.all_reduce(ones, op=dist.ReduceOp.MAX)
    told: list[object] = [None, None]
    dist.all_gather_object(told, dist.get_rank())
    assert told == [0, 1]
    if dist.get_rank() == 0:
        dist.send(ones, 1)
    else:
        dist.recv(ones, 0)
    pair = dist.new_group([1, 0])
    dist.all_reduce(ones, group=pair)
    train(DistributedDataParallel(torch.nn.Linear(8, 8)))
    sharded = torch.nn.Linear(8, 8)
    fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
    train(sharded)
    dist.barrier()
    backend = dist.get_backend(), dist.get_backend(pair)
    dist.destroy_process_group()  # joins gloo's threads: every end has been told
    with open(f"{sys.argv[1]}-{sys.argv[2]}", "w") as file:
        json.dump({"entered": notes.entered, "left": notes.left, "backend": backend}, file)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
