"""One rank that plays steps of a sharded model three ways, in turn, and times each. One JSON line.

`synced` is FSDP2 as it comes, over gloo: a reduce-scatter in every micro-batch. `accumulated` keeps
whole gradients and reduces them in the last one. `canonical` is ftkit's reduction over its own
group. The rest of the step is the same; the ways alternate, so that load falls on all alike.
`init_s` is what destroying gloo's group and making it anew takes.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ftkit.collectives import backend
from ftkit.collectives.sharded import ShardedReducer, assign_rounds
from ftkit.collectives.sharded_unit import Pending
from ftkit.launch.workload.gpt import GPT, next_byte_loss
from ftkit.launch.workload.train import Options, parse, shard

WAYS = ("synced", "accumulated", "canonical")


class Way:
    """A model of its own, and how its gradients are reduced."""

    def __init__(self, name: str, options: Options, mesh: DeviceMesh) -> None:
        self.name, self.options = name, options
        self.model: Any = GPT(options.model, seed=0)
        shard(self.model, mesh)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, foreach=False)
        self.size, self.rank = dist.get_world_size(), dist.get_rank()
        self.reducer: ShardedReducer | None = None
        if name == "canonical":
            self.reducer = ShardedReducer(
                [self.model],
                slots=options.slots,
                world_size=self.size,
                rank=self.rank,
                exchange=_exchange,
            )

    def step(self, number: int) -> float:
        """Play one step; the seconds it took."""
        plays = assign_rounds(self.options.slots, self.size, self.rank)
        dist.barrier()
        start = time.perf_counter()
        if self.reducer is not None:
            self.reducer.begin()
        for slot in plays:
            last = slot == plays[-1]
            torch.manual_seed(1000 * number + slot)
            shape = self.options.slot_size, self.options.model.context
            x, y = torch.randint(0, 256, shape), torch.randint(0, 256, shape)
            if self.reducer is not None:
                self.reducer.start_slot(slot, last=last)
            if self.name == "accumulated":
                self.model.set_requires_gradient_sync(last)
            next_byte_loss(self.model(x), y).backward()
        if self.reducer is not None:
            self.reducer.finish(held=len(plays))
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - start


def _exchange(out: torch.Tensor, rows: torch.Tensor, *, last: bool) -> Pending:
    work: Pending | None = dist.all_to_all_single(out, rows, async_op=True)
    assert work is not None, "every rank is in the world"
    return work


def timed(what: Callable[[], None]) -> float:
    """The seconds it takes."""
    start = time.perf_counter()
    what()
    return time.perf_counter() - start


def main(argv: list[str]) -> None:
    """`argv`: rounds, then the job's options."""
    rounds, options = int(argv[0]), parse(argv[1:])
    torch.set_num_threads(1)
    backend.register()
    dist.init_process_group("ftkit")
    size = dist.get_world_size()
    gloo = dist.new_group(backend="gloo")
    meshes = {"canonical": init_device_mesh("cpu", (size,))}
    plain = DeviceMesh.from_group(gloo, "cpu")
    ways = [Way(name, options, meshes.get(name, plain)) for name in WAYS]
    for way in ways:  # the first step makes the optimizer's state
        way.step(0)
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    for number in range(1, rounds + 1):
        for way in ways:
            times[way.name].append(way.step(number))
    dist.destroy_process_group()

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]) + 1
    store = TCPStore(host, port, size, os.environ["RANK"] == "0", timedelta(seconds=60))

    def group(turn: int) -> None:
        prefix = PrefixStore(str(turn), store)
        dist.init_process_group("gloo", store=prefix, rank=int(os.environ["RANK"]), world_size=size)

    group(0)
    renewals = []
    for turn in range(1, 4):
        dist.barrier()
        renewals.append(timed(dist.destroy_process_group) + timed(lambda turn=turn: group(turn)))  # type: ignore[misc]
    dist.barrier()
    print(json.dumps({"times": times, "init_s": renewals}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
