"""What one rank of `collectives` runs: the same work by several sides, in turn.

The default process group is ftkit's; gloo's is a group of the same ranks beside it. A *block* is
a number of operations, or steps, back to back; blocks of all sides alternate, each behind a
barrier. Prints one JSON line: for every case the seconds per operation of each block and the
processor seconds, by side, and a digest of what each side computed.
"""

import argparse
import gc
import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import timedelta
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
import xxhash
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from ftkit.collectives import backend
from ftkit.collectives.arithmetic import Bytes, bounds
from ftkit.collectives.config import CollectivesConfig, Transport
from ftkit.collectives.gradients import GradientReducer
from ftkit.collectives.process_group import FtkitProcessGroup
from ftkit.collectives.resident import Mappings, Place, find, resident
from ftkit.collectives.slots import assign

#: Bytes of a block: small operations are timed many at once.
BLOCK_BYTES = 4 << 20
BLOCK_OPS_MAX = 50
BLOCK_STEPS = 3
#: Cases that train; all others are collective operations of so many bytes.
TRAINING = ("step", "fsdp")
#: What a fold works on at a time, also in the bound.
PIECE = 256 << 10

Run = Callable[[], object]
Sides = dict[str, tuple[Run, torch.Tensor]]
"""What a side does once, and where its result lies."""


def main(argv: Sequence[str] | None = None) -> None:
    """Join, run every case, print what came of it."""
    options = parse(argv)
    torch.set_num_threads(1)
    backend.register()
    dist.init_process_group(
        "ftkit",
        pg_options=CollectivesConfig(transport=Transport(options.transport)),
        timeout=timedelta(seconds=120),
    )
    gloo = dist.new_group(backend="gloo", timeout=timedelta(seconds=120))
    done = []
    for case in options.cases:
        name, _, number = case.partition(":")
        if name in TRAINING:
            sides = step_sides(int(number), gloo) if name == "step" else fsdp_sides(gloo)
            done.append(time_sides(case, sides, options.blocks, 1, again=id))
        else:
            size = int(number)
            ops = max(1, min(BLOCK_OPS_MAX, BLOCK_BYTES // size))
            same_host = options.transport != "tcp"
            sides = operation_sides(name, size, gloo, same_host=same_host)
            # A sum that is summed again and again stays finite if it is zero; it takes as long.
            done.append(time_sides(case, sides, options.blocks, ops, again=torch.zero_))
    dist.destroy_process_group()
    print(json.dumps(done))


def time_sides(
    case: str, sides: Sides, blocks: int, ops: int, *, again: Callable[[torch.Tensor], object]
) -> dict[str, Any]:
    """One case: what each side computed, and how long `blocks` blocks of each took. Blocks.

    Args:
      case: its name.
      sides: each is run once for its digest.
      blocks: of each side, and one more that is not counted.
      ops: in a block.
      again: makes a result ready for the many runs that follow.
    """
    digests = {}
    for side, (run, result) in sides.items():
        run()
        digests[side] = xxhash.xxh3_64_hexdigest(result.detach().view(torch.uint8).numpy().data)
        again(result)
    times: dict[str, list[float]] = {side: [] for side in sides}
    spent: dict[str, list[float]] = {side: [] for side in sides}
    order = list(sides)
    gc.collect()
    for number in range(blocks + 1):
        for side in order:
            run = sides[side][0]
            dist.barrier()
            start, cpu = time.perf_counter(), time.process_time()
            for _ in range(ops):
                run()
            if number:  # the first block of each warms up
                times[side].append((time.perf_counter() - start) / ops)
                spent[side].append((time.process_time() - cpu) / ops)
        order = [*order[1:], order[0]]
    return {"case": case, "times": times, "spent": spent, "digests": digests}


def operation_sides(name: str, size: int, gloo: Any, *, same_host: bool) -> Sides:
    """One collective operation on `size` bytes."""
    rank, world = dist.get_rank(), dist.get_world_size()
    count = size // 4 // world * world

    def fill(data: torch.Tensor) -> torch.Tensor:
        """Integers that every order of adding sums without rounding."""
        data.copy_(torch.arange(count, dtype=torch.float32).remainder_(1021).mul_(rank + 1))
        return data

    def all_reduce(group: Any, data: torch.Tensor) -> tuple[Run, torch.Tensor]:
        return lambda: dist.all_reduce(data, group=group), data

    def reduce_scatter(group: Any) -> tuple[Run, torch.Tensor]:
        data, share = fill(torch.empty(count)), torch.empty(count // world)
        return lambda: dist.reduce_scatter_single(share, data, group=group), share

    def all_gather(group: Any) -> tuple[Run, torch.Tensor]:
        share, whole = fill(torch.empty(count))[: count // world].clone(), torch.empty(count)
        return lambda: dist.all_gather_single(whole, share, group=group), whole

    match name:
        case "reduce_scatter":
            return {"gloo": reduce_scatter(gloo), "ftkit": reduce_scatter(None)}
        case "all_gather":
            return {"gloo": all_gather(gloo), "ftkit": all_gather(None)}
    sides = {side: all_reduce(group, fill(torch.empty(count))) for side, group in (
        ("gloo", gloo), ("ftkit", None))}  # fmt: skip
    if same_host:
        sides["resident"] = all_reduce(None, fill(resident(count)))
        sides["bound"] = bound(fill(resident(count)))
    return sides


def bound(data: torch.Tensor) -> tuple[Run, torch.Tensor]:
    """The adds and copies of an all-reduce on resident buffers, and nothing else.

    Each rank folds its chunk straight out of everybody's memory and copies the others' chunks,
    without asking whether they are there: no all-reduce that folds by chunks can be faster.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = data.numpy()
    places: list[Any] = [None] * world
    dist.all_gather_object(places, (os.getpid(), find(data.data_ptr(), mine.nbytes)))
    views = [mine] * world
    for r, (pid, place) in enumerate(places):
        if r != rank:
            view = Mappings(pid).view(Place(*place), mine.nbytes)
            views[r] = cast("Bytes", view).view(np.float32)
    limits = bounds(mine.size, world)
    chunks = [slice(limits[r], limits[r + 1]) for r in range(world)]
    others = [(rank + i) % world for i in range(1, world)]
    step = PIECE // 4

    def run() -> None:
        for at in range(chunks[rank].start, chunks[rank].stop, step):
            part = slice(at, min(at + step, chunks[rank].stop))
            for r in others:
                np.add(mine[part], views[r][part], out=mine[part])
        for r in others:
            np.copyto(mine[chunks[r]], views[r][chunks[r]])

    return run, data


def network() -> nn.Sequential:
    """The network that is trained, of 4.2 M parameters; the same on every rank and side."""
    torch.manual_seed(0)
    return nn.Sequential(*(m for _ in range(4) for m in (nn.Linear(1024, 1024), nn.ReLU())))


def update(model: nn.Module) -> None:
    """The smallest optimizer there is."""
    with torch.no_grad():
        for param in model.parameters():
            assert param.grad is not None, "every parameter is used"
            param.sub_(param.grad, alpha=1e-3)
            param.grad = None


def several(run: Run) -> Run:
    """A block of steps."""

    def steps() -> None:
        for _ in range(BLOCK_STEPS):
            run()

    return steps


def fsdp_sides(gloo: Any) -> Sides:
    """A step of an FSDP2 model sharded over all ranks, a layer at a time, over either group."""
    rank = dist.get_rank()
    batch = torch.randn(4, 1024, generator=torch.Generator().manual_seed(rank))

    def side(group: Any) -> tuple[Run, torch.Tensor]:
        model, mesh = network(), DeviceMesh.from_group(group, "cpu")
        for layer in model:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)

        def run() -> None:
            model(batch).square().mean().backward()
            update(model)

        return several(run), cast("Any", model[0]).weight.to_local()

    return {"gloo": side(gloo), "ftkit": side(dist.group.WORLD)}


def step_sides(slots: int, gloo: Any) -> Sides:
    """A training step: alone, by DDP over gloo and over ftkit, and by canonical reduction.

    `slots` micro-batches of the whole world; each rank adds up those it holds.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    held = assign(slots, world)[rank]
    batches = [torch.randn(4, 1024, generator=torch.Generator().manual_seed(slot)) for slot in held]

    def last(model: nn.Module) -> torch.Tensor:
        return list(model.parameters())[-2].data

    def train(model: nn.Module, quiet: Callable[[], Any]) -> Run:
        def run() -> None:
            for number, batch in enumerate(batches):
                with quiet() if number < len(batches) - 1 else nullcontext():
                    model(batch).square().mean().backward()
            update(model)

        return run

    alone, over_gloo, over_ftkit, canonical = (network() for _ in range(4))
    ddp = {
        "gloo": DistributedDataParallel(over_gloo, process_group=gloo),
        "ftkit": DistributedDataParallel(over_ftkit),
    }
    group = cast("FtkitProcessGroup", dist.group.WORLD).group
    reducer = GradientReducer(
        canonical.parameters(),
        slots=slots,
        reduce=lambda nodes, out, scale: group.reduce_slots(nodes, out, slots=slots, scale=scale),
    )

    def canonical_step() -> None:
        reducer.begin()
        for number, (slot, batch) in enumerate(zip(held, batches, strict=True)):
            reducer.start_slot(slot, last=number == len(held) - 1)
            canonical(batch).square().mean().backward()
            reducer.end_slot()
        reducer.finish(held=len(held))
        reducer.end()
        update(canonical)

    return {
        "alone": (several(train(alone, nullcontext)), last(alone)),
        "gloo": (several(train(ddp["gloo"], ddp["gloo"].no_sync)), last(over_gloo)),
        "ftkit": (several(train(ddp["ftkit"], ddp["ftkit"].no_sync)), last(over_ftkit)),
        "canonical": (several(canonical_step), last(canonical)),
    }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("cases", nargs="+", help="all_reduce:BYTES, ..., step:SLOTS, fsdp")
    made.add_argument("--blocks", type=int, default=5)
    made.add_argument("--transport", choices=["auto", "tcp"], default="auto")
    return made.parse_args(argv)


if __name__ == "__main__":
    main()
