"""Saved in one world, loaded in another: real ranks, real collectives, every layout to every other.

Whether the elements came back is judged by torch: `full_tensor()` before and after, bit for bit.
"""

# mypy: allow-untyped-calls

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ftkit.checkpoint.arena import Arena, arena_path
from ftkit.checkpoint.capture import Capture
from ftkit.checkpoint.load import load_state, small_of_seats
from ftkit.checkpoint.memory import as_numpy
from ftkit.checkpoint.provision import ensure_arena
from ftkit.checkpoint.shards import is_dtensor
from ftkit.checkpoint.state import ProtectedState
from ftkit.core.ids import Generation, JobId, Seat, Step
from tests.checkpoint.helpers import snapshot_of_seats
from tests.collectives.crew import Crew

pytestmark = pytest.mark.multiproc

STEP = Step(2)


class Net(nn.Module):
    """Sizes that neither 2, 3 nor 4 ranks divide; at 4, biases leave a rank without any."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(7, 10)
        self.second = nn.Linear(10, 5)
        self.norm = nn.LayerNorm(5)
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.get_buffer("seen").add_(1)
        return self.norm(self.second(torch.relu(self.first(x))))  # type: ignore[no-any-return]


def build(layout: str, size: int, seed: int) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )
    from torch.nn.parallel import DistributedDataParallel

    net = Net(seed)
    plan = {"first": ColwiseParallel(use_local_output=False), "second": RowwiseParallel()}
    match layout:
        case "ddp":
            return DistributedDataParallel(net)
        case "fsdp":
            mesh = init_device_mesh("cpu", (size,))
            fully_shard(net.first, mesh=mesh)
            fully_shard(net, mesh=mesh)
        case "hsdp":
            mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("copy", "shard"))
            fully_shard(net, mesh=mesh)
        case "tp":
            parallelize_module(net, init_device_mesh("cpu", (size,)), plan)
        case "tp_fsdp":
            mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("dp", "tp"))
            parallelize_module(net, mesh["tp"], plan)
            fully_shard(net, mesh=mesh["dp"])
    return net


def layouts(size: int) -> list[str]:
    return ["ddp", "fsdp", "tp"] + (["hsdp", "tp_fsdp"] if size == 4 else [])


class Training:
    def __init__(self, layout: str, size: int, seed: int = 0, lr: float = 1e-2) -> None:
        self.model = build(layout, size, seed)
        # Parameters that are and that are no DTensors cannot be updated in one foreach call.
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr, foreach=False)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 1, gamma=0.5)
        self.state = ProtectedState(
            model=self.model, optimizer=self.optimizer, scheduler=self.scheduler
        )

    def train(self, step: int) -> None:
        x = torch.randn(4, 7, generator=torch.Generator().manual_seed(step))
        self.model(x).square().sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()

    def full(self) -> dict[str, np.ndarray[Any, Any]]:
        """Every tensor whole, gathered by torch."""
        from ftkit.checkpoint.walk import OptimizerWalk, named_tensors

        found = {name: tensor for name, tensor, _ in named_tensors("model", self.model)}
        names = {id(tensor): name for name, tensor in found.items()}
        walk = OptimizerWalk("optimizer", self.optimizer, lambda p: names.get(id(p)))
        found |= dict(walk.named_tensors())
        return {
            name: as_numpy(tensor.full_tensor() if is_dtensor(tensor) else tensor).copy()  # type: ignore[attr-defined]
            for name, tensor in found.items()
        }


def join(rank: int, size: int, folder: Path, name: str) -> None:
    import torch.distributed as dist
    from torch._C._distributed_c10d import FileStore

    store = FileStore(str(folder / f"store-{name}"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)


def save(rank: int, size: int, talk: Any, folder: Path) -> None:
    join(rank, size, folder, f"save-{size}")
    for layout in layouts(size):
        training = Training(layout, size)
        for step in range(1, STEP + 1):
            training.train(step)
        path = arena_path(JobId(f"{layout}-{size}"), Seat(rank), folder)
        with (
            ensure_arena(path, training.state.layout(), chunk_bytes=256) as arena,
            Capture(arena, training.state) as capture,
        ):
            capture.begin(STEP, Generation(1))
        full = training.full()
        if rank == 0:
            np.savez(folder / f"{layout}-{size}.npz", **full)  # type: ignore[arg-type]  # names
    talk.everyone("saved")


def arenas_of(folder: Path, saved: str) -> dict[Seat, Arena]:
    seats = range(int(saved.rsplit("-")[-1]))
    return {Seat(s): Arena.open(arena_path(JobId(saved), Seat(s), folder)) for s in seats}


def load(rank: int, size: int, talk: Any, folder: Path, saved: list[str]) -> list[str]:
    """Load everything saved into every layout of this world; what came back otherwise."""
    join(rank, size, folder, f"load-{size}")
    wrong = []
    for source in saved:
        arenas = arenas_of(folder, source)
        with np.load(folder / f"{source}.npz") as file:
            expected = dict(file)
        for layout in layouts(size):
            training = Training(layout, size, seed=9, lr=1.0)
            objects = [id(p) for p in training.model.parameters()]
            sources, by_seat = snapshot_of_seats(arenas, STEP, seat=Seat(rank))
            smalls = {seat: found.head.small for seat, found in by_seat.items()}
            small = small_of_seats(smalls, Seat(rank))
            report = load_state(training.state, sources, small=small)
            held = sum(e.bytes for e in training.state.layout().entries)
            found = training.full()
            wrong += [
                f"{source} to {layout}-{size}: {name}"
                for name in expected.keys() | found.keys()
                if name not in found
                or name not in expected
                or not np.array_equal(expected[name], found[name])
            ]
            if report.bytes != held or report.fallbacks:
                wrong.append(f"{source} to {layout}-{size}: read {report}, holds {held} bytes")
            if training.optimizer.param_groups[0]["lr"] != 0.0025:
                wrong.append(f"{source} to {layout}-{size}: learning rate")
            if [id(p) for p in training.model.parameters()] != objects:
                wrong.append(f"{source} to {layout}-{size}: parameters were replaced")
            training.train(3)
    talk.everyone("loaded")
    return wrong


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("worlds")
    for size in (2, 4):
        with Crew(save, size, folder) as crew:
            crew.results()
    return folder


ALL = [f"{layout}-{size}" for size in (2, 4) for layout in layouts(size)]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_any_layout_loads_into_any_other(saved, size):
    with Crew(load, size, saved, ALL) as crew:
        assert crew.results() == [[]] * size


def test_the_worlds_differ_and_shards_are_parts(saved):
    """The comparison above would hold trivially if all arenas held everything."""
    held = {}
    for name in ALL:
        arenas = arenas_of(saved, name)
        heads = [arena.head(arena.find(STEP)) for arena in arenas.values()]
        held[name] = [head.layout for head in heads]
    assert len({layout.digest for layout in held["ddp-4"]}) == 1
    assert len({layout.digest for layout in held["hsdp-4"]}) == 2
    assert len({layout.digest for layout in held["fsdp-4"]}) > 2
    boxes = [
        [e.box for e in layout.entries if "norm.weight" in e.name] for layout in held["fsdp-4"]
    ]
    assert [b[0].shape for b in boxes] == [(2,), (2,), (1,), (0,)]
    bytes_of = {n: [sum(e.bytes for e in layout.entries) for layout in held[n]] for n in ALL}
    assert sum(bytes_of["tp_fsdp-4"]) < 2 * bytes_of["ddp-4"][0]


def test_a_damaged_shard_comes_from_the_replica_that_has_it(saved):
    """HSDP holds every shard twice; one process reads a part of the model from three seats."""
    arenas = arenas_of(saved, "hsdp-4")
    sealed = arenas[Seat(0)].find(STEP)
    entry = next(
        e for e in arenas[Seat(0)].head(sealed).layout.entries if e.name == "model/first.weight"
    )
    with Arena.open(arenas[Seat(0)].path, writable=True) as arena:
        slab = arena.slabs().index(sealed)
        arena._file.bytes[arena.geometry.slab_at(slab) + arena.geometry.data_at + entry.at] ^= 1
    net = Net(seed=5)
    sources, _ = snapshot_of_seats(arenas, STEP, seat=Seat(0))
    report = load_state(ProtectedState(model=net), sources, names="model/first.*")
    with np.load(saved / "hsdp-4.npz") as file:
        for name in ("weight", "bias"):
            found = as_numpy(net.first.get_parameter(name))
            assert np.array_equal(found, file[f"model/first.{name}"])
    assert sorted({f.source for f in report.fallbacks}) == ["ftkit-hsdp-4-0.arena"]
    assert report.bytes_by_source[0] < report.bytes_by_source[2]
    assert report.bytes_by_source[3] == 0, "nobody asked the replica of what was whole"
