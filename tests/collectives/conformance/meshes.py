"""Cases on a mesh of 2 x 2 ranks: FSDP2, HSDP, tensor parallelism, DTensor, checkpoints.

Every reduction is between two ranks, so the bits must be gloo's.
"""

# mypy: allow-untyped-calls
# mypy: disable-error-code="union-attr"

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from .case import Case, Side


def cases(size: int) -> Iterator[Case]:
    runs: dict[str, Callable[[Side], Any]] = {
        "fsdp2 of two": lambda s: fsdp(s, mesh(s)["inner"]),
        "fsdp2 kept whole after forward": lambda s: fsdp(
            s, mesh(s)["inner"], reshard_after_forward=False
        ),
        "fsdp2 in bfloat16": lambda s: fsdp(
            s,
            mesh(s)["inner"],
            mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
        ),
        "hsdp": lambda s: fsdp(s, mesh(s)),
        "tensor parallel": tensor_parallel,
        "sequence parallel": sequence_parallel,
        "fsdp2 over tensor parallel": fsdp_over_tensor_parallel,
        "a pipeline of two stages": pipeline,
        "dtensor redistributed": redistributed,
        "checkpoint saved and loaded": checkpointed,
        "sums along both dimensions": both_dimensions,
    }
    for name, run in runs.items():
        yield Case(f"mesh: {name}", run)


_MESHES: dict[str, DeviceMesh] = {}


def mesh(side: Side) -> DeviceMesh:
    """outer x inner, of groups of the side's backend; every rank makes all of them."""
    if side.name not in _MESHES:
        groups = {
            ranks: dist.new_group(list(ranks), backend=side.name)
            for ranks in [(0, 1), (2, 3), (0, 2), (1, 3)]
        }
        rank = dist.get_rank()
        mine = [
            next(g for r, g in groups.items() if rank in r and (r[1] - r[0] == gap))
            for gap in (2, 1)
        ]
        _MESHES[side.name] = DeviceMesh.from_group(
            mine, "cpu", torch.arange(4).view(2, 2), mesh_dim_names=("outer", "inner")
        )
    return _MESHES[side.name]


def net():
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(16, 36), nn.ReLU(), nn.Linear(36, 6))


def batch(step, salt=0):
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(100 * step + salt))


def steps(model, salt, optimizer=None):
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), 0.01, foreach=False)
    losses = []
    for step in range(3):
        loss = model(batch(step, salt)).float().pow(2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses


def whole(value):
    return value.full_tensor() if isinstance(value, DTensor) else value


def state(model):
    return [whole(value.detach()) for value in model.state_dict().values()]


def fsdp(side, on, **options):
    model = net()
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=on, **options)
    losses = steps(model, dist.get_rank())
    return losses, state(model)


def tensor_parallel(side):
    model = parallelize_module(
        net(), mesh(side)["inner"], {"0": ColwiseParallel(), "2": RowwiseParallel()}
    )
    losses = steps(model, 0)
    return [whole(loss) for loss in losses], state(model)


def sequence_parallel(side):
    torch.manual_seed(7)
    model = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 36), nn.Linear(36, 6))
    plan = {
        "0": SequenceParallel(sequence_dim=0),
        "1": ColwiseParallel(input_layouts=Shard(0)),
        "2": RowwiseParallel(output_layouts=Replicate()),
    }
    split = parallelize_module(model, mesh(side)["inner"], plan)
    return [whole(loss) for loss in steps(split, 0)], state(split)


def fsdp_over_tensor_parallel(side):
    model = parallelize_module(
        net(), mesh(side)["inner"], {"0": ColwiseParallel(), "2": RowwiseParallel()}
    )
    fully_shard(model, mesh=mesh(side)["outer"])
    losses = steps(model, dist.get_rank() // 2)
    return [whole(loss) for loss in losses], state(model)


def pipeline(side):
    """Four micro-batches through two stages, forward and backward."""
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    group = mesh(side)["inner"].get_group()
    place, model = dist.get_rank(group), net()
    part = model[:2] if place == 0 else model[2:]
    stage = PipelineStage(part, place, 2, torch.device("cpu"), group=group)
    schedule = ScheduleGPipe(stage, 4, loss_fn=nn.functional.mse_loss)
    optimizer = torch.optim.SGD(part.parameters(), 0.05)
    losses: list[torch.Tensor] = []
    for step in range(2):
        if place == 0:
            schedule.step(batch(step, dist.get_rank() // 2))
        else:
            schedule.step(target=torch.ones(8, 6), losses=losses)
        optimizer.step()
        optimizer.zero_grad()
    return [loss.detach() for loss in losses], state(part)


def redistributed(side):
    on = mesh(side)
    value = torch.arange(35.0).view(7, 5)
    outs = []
    for before in [(Shard(0), Shard(1)), (Replicate(), Shard(0)), (Shard(1), Shard(1))]:
        for after in [(Shard(1), Shard(0)), (Replicate(), Replicate()), (Shard(0), Replicate())]:
            moved = distribute_tensor(value, on, list(before)).redistribute(on, list(after))
            outs.append(moved.to_local())
    partial_ = DTensor.from_local(value * (dist.get_rank() + 1), on, [Partial(), Partial()])
    outs.append(partial_.redistribute(on, [Shard(0), Replicate()]).to_local())
    return outs


def checkpointed(side):
    """Saved from an HSDP model and its optimizer, loaded into another one."""
    group = side.group
    box = [tempfile.mkdtemp() if side.rank == 0 else ""]
    dist.broadcast_object_list(box, src=0, group=group)
    try:
        models = []
        for salt in (1, 2):
            model = net()
            fully_shard(model, mesh=mesh(side))
            optimizer = torch.optim.AdamW(model.parameters(), 0.01, foreach=False)
            steps(model, dist.get_rank() + salt, optimizer)
            models.append({"model": model, "optimizer": optimizer})

        def states(of):
            return {"model": of["model"].state_dict(), "optimizer": of["optimizer"].state_dict()}

        dcp.save(states(models[0]), checkpoint_id=box[0], process_group=group)
        into = states(models[1])
        dcp.load(into, checkpoint_id=box[0], process_group=group)
        saved, loaded = flat_state(states(models[0])), flat_state(into)
        assert all(map(torch.equal, saved, loaded))
        return loaded, sorted(p.name for p in Path(box[0]).iterdir())
    finally:
        dist.barrier(group)
        if side.rank == 0:
            shutil.rmtree(box[0])


def flat_state(value):
    if isinstance(value, torch.Tensor):
        return [whole(value.detach())]
    if isinstance(value, dict):
        return [leaf for v in value.values() for leaf in flat_state(v)]
    if isinstance(value, list):
        return [leaf for v in value for leaf in flat_state(v)]
    return []


def both_dimensions(side):
    outs = []
    for name in ("outer", "inner"):
        tensor = torch.full((3,), float(dist.get_rank()))
        dist.all_reduce(tensor, group=mesh(side)[name].get_group())
        outs.append(tensor)
    return outs, str(mesh(side).get_coordinate())
