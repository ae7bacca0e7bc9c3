"""DTensors as boxes, every rank of a mesh played in turn on a process group that says nothing."""

import json
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from ftkit.checkpoint.box import Box
from ftkit.checkpoint.chunks import units
from ftkit.checkpoint.layout import StateLayout
from ftkit.checkpoint.memory import LiveMemory
from ftkit.checkpoint.shards import boxes_of, fresh_like, local_of
from ftkit.checkpoint.state import ProtectedState
from ftkit.core.errors import StateChanged, UsageError


@contextmanager
def rank_of(rank: int, mesh_shape: tuple[int, ...]):
    world = int(torch.tensor(mesh_shape).prod())
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        names = ("dp", "tp", "cp")[: len(mesh_shape)]
        yield init_device_mesh("cpu", mesh_shape, mesh_dim_names=names)
    finally:
        dist.destroy_process_group()


PLACEMENTS = [
    ((4,), [Shard(0)]),
    ((4,), [Shard(1)]),
    ((4,), [Replicate()]),
    ((4,), [_StridedShard(0, split_factor=2)]),
    ((4,), [_StridedShard(1, split_factor=3)]),
    ((2, 2), [Replicate(), Shard(0)]),
    ((2, 2), [Shard(0), Shard(0)]),
    ((2, 2), [Shard(1), Shard(0)]),
    ((2, 3), [Shard(0), Shard(1)]),
    ((2, 2), [_StridedShard(0, split_factor=2), Shard(0)]),
    ((2, 2), [_StridedShard(0, split_factor=2), Replicate()]),
    ((2, 2), [_StridedShard(0, split_factor=2), Shard(1)]),
    ((2, 2, 2), [Shard(0), _StridedShard(0, split_factor=2), Shard(0)]),
    ((2, 2), [_StridedShard(0, split_factor=3), _StridedShard(1, split_factor=2)]),
]


@pytest.mark.parametrize(("mesh_shape", "placements"), PLACEMENTS, ids=str)
@pytest.mark.parametrize("shape", [(8, 6), (7, 5), (3, 2), (1, 9), (0, 4)], ids=str)
def test_boxes_are_where_the_elements_are(mesh_shape, placements, shape):
    """Each element of the local tensor is the one its box says; ranks hold all together."""
    full = torch.arange(float(torch.tensor(shape).prod())).view(shape)
    seen = torch.zeros(shape, dtype=torch.int)
    world = int(torch.tensor(mesh_shape).prod())
    copies = world
    for size, placement in zip(mesh_shape, placements, strict=True):
        copies = copies if placement.is_replicate() else copies // size
    for rank in range(world):
        with rank_of(rank, mesh_shape) as mesh:
            tensor = distribute_tensor(full, mesh, placements, src_data_rank=None)
            held = boxes_of("w", tensor)
            assert sum(box.elements for box, _ in held) == tensor.to_local().numel()
            for box, view in held:
                assert torch.equal(view, full[box.slices])
                seen[box.slices] += 1
    assert (seen == copies).all()


def test_views_share_the_memory_of_the_local_tensor():
    with rank_of(1, (4,)) as mesh:
        placed = [_StridedShard(0, split_factor=2)]
        tensor = distribute_tensor(torch.zeros(8, 2), mesh, placed, src_data_rank=None)
        held = boxes_of("w", tensor)
        assert [box for box, _ in held] == [Box((1, 0), (1, 2)), Box((5, 0), (1, 2))]
        held[1][1].fill_(7)
        assert tensor.to_local().tolist() == [[0, 0], [7, 7]]


@pytest.mark.parametrize(("mesh_shape", "placements"), PLACEMENTS, ids=str)
def test_fresh_memory_is_placed_as_what_it_is_like(mesh_shape, placements):
    with rank_of(1, mesh_shape) as mesh:
        like = distribute_tensor(torch.zeros(7, 5), mesh, placements, src_data_rank=None)
        made = fresh_like(like, torch.float64)
        wanted = torch.empty_like(like, dtype=torch.float64, requires_grad=False)
        assert isinstance(made, DTensor)
        assert isinstance(wanted, DTensor)
        assert (made.dtype, made.shape, made.stride()) == (
            wanted.dtype,
            wanted.shape,
            wanted.stride(),
        )
        assert (made.placements, made.device_mesh) == (wanted.placements, wanted.device_mesh)
        assert local_of(made).shape == local_of(wanted).shape
        assert not made.requires_grad


def test_a_plain_tensor_is_one_box_and_itself():
    tensor = nn.Parameter(torch.ones(2, 3))
    ((box, view),) = boxes_of("w", tensor)
    assert box == Box((0, 0), (2, 3))
    assert view is tensor


def test_what_has_no_boxes_is_refused():
    with rank_of(0, (2,)) as mesh:
        partial = DTensor.from_local(torch.ones(2), mesh, [Partial()], run_check=False)
        with pytest.raises(UsageError, match=r"x/w is a DTensor with an unreduced placement"):
            boxes_of("x/w", partial)
        odd = DTensor.from_local(torch.ones(3), mesh, [Shard(0)], run_check=False, shape=torch.Size([5]),
                                 stride=(1,))  # fmt: skip
        assert boxes_of("w", odd)[0][0] == Box((0,), (3,))
        odd = DTensor.from_local(torch.ones(2), mesh, [Shard(0)], run_check=False, shape=torch.Size([5]),
                                 stride=(1,))  # fmt: skip
        with pytest.raises(UsageError, match=r"should hold \[3\] of it and holds \[2\]"):
            boxes_of("w", odd)
        elsewhere = DeviceMesh("cpu", [1], _init_backend=False, _rank=0)
        away = DTensor.from_local(torch.ones(2), elsewhere, [Shard(0)], run_check=False)
        with pytest.raises(UsageError, match=r"mesh of ranks \[1\], and this is rank 0"):
            boxes_of("w", away)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Linear(5, 8)
        self.second = nn.Linear(8, 3)
        self.register_buffer("count", torch.zeros(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))  # type: ignore[no-any-return]


def tp_fsdp(mesh: DeviceMesh) -> Net:
    net = Net()
    plan = {"first": ColwiseParallel(), "second": RowwiseParallel()}
    parallelize_module(net, mesh["tp"], plan, src_data_rank=None)
    fully_shard(net, mesh=mesh["dp"])
    return net


def test_fsdp_over_tensor_parallel_after_this_process_was_another_rank():
    """FSDP2 keeps the mesh it made for rank 0; the boxes are those of the rank we are."""
    full = dict(Net().named_parameters())
    for rank in (0, 3, 1):
        with rank_of(rank, (2, 2)) as mesh:
            net = tp_fsdp(mesh)
            for name, parameter in net.named_parameters():
                for box, view in boxes_of(name, parameter):
                    assert torch.equal(view, full[name][box.slices]), (rank, name)


def test_layouts_of_replicas_are_equal_and_of_shards_differ():
    digests = []
    for rank in range(4):
        with rank_of(rank, (2, 2)) as mesh:
            net = Net()
            fully_shard(net, mesh=mesh)
            layout = ProtectedState(model=net).layout()
            assert StateLayout.decode(layout.encoded) == layout
            digests.append(layout.digest)
    assert digests[0] == digests[2] != digests[1] == digests[3]


def test_several_boxes_of_a_tensor_and_an_empty_one_are_entries_of_their_own():
    class Odd(nn.Module):
        def __init__(self, mesh: DeviceMesh) -> None:
            super().__init__()
            for name, rows, placement in (
                ("many", 8, _StridedShard(0, split_factor=2)),
                ("none", 3, Shard(0)),
            ):
                full = torch.arange(float(rows))
                tensor = distribute_tensor(full, mesh, [placement], src_data_rank=None)
                setattr(self, name, nn.Parameter(tensor))

    with rank_of(3, (4,)) as mesh:
        state = ProtectedState(model=Odd(mesh))
        entries = state.layout().entries
        assert [(e.name, e.offsets, e.shape, e.global_shape) for e in entries] == [
            ("model/many", (3,), (1,), (8,)),
            ("model/many", (7,), (1,), (8,)),
            ("model/none", (0,), (0,), (3,)),
        ]
        assert [t.tolist() for t in state.tensors()] == [[3], [7], []]


class Strided(nn.Module):
    """A parameter and a buffer, each several boxes, columns of a matrix."""

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__()
        full = torch.arange(60.0).view(5, 12)
        place = [_StridedShard(1, split_factor=3)]
        self.w = nn.Parameter(distribute_tensor(full, mesh, place, src_data_rank=None))
        self.register_buffer("b", distribute_tensor(-full, mesh, place, src_data_rank=None))


def take(state: ProtectedState) -> tuple[StateLayout, bytes, dict[str, Any]]:
    """A snapshot as a capture makes it."""
    picture = state.picture()
    sources, data = LiveMemory(), np.zeros(picture.layout.total_bytes, dtype=np.uint8)
    sources.bind(picture.live, range(len(picture.live)))
    for unit in units(picture.layout, 64, sources.whole):
        sources.copy(unit, data)
    return picture.layout, data.tobytes(), json.loads(picture.small)


def test_several_boxes_are_captured_and_restored_in_place():
    with rank_of(1, (2,)) as mesh:
        net = Strided(mesh)
        state = ProtectedState(model=net)
        layout, data, small = take(state)
        assert len(layout.entries) == 6
        memory = [local_of(t) for t in (net.w, net.get_buffer("b"))]
        before = [t.clone() for t in memory]
        for tensor in memory:
            tensor.detach().zero_()
        state.load(layout, [data], small)
        assert [local_of(t) for t in (net.w, net.get_buffer("b"))] == memory
        assert all(map(torch.equal, memory, before))
        assert before[0][0].tolist() == [2, 3, 6, 7, 10, 11]


def trained_fsdp(mesh: DeviceMesh, *, steps: int = 1) -> tuple[Net, ProtectedState]:
    net = Net()
    fully_shard(net, mesh=mesh)
    optimizer = torch.optim.AdamW(net.parameters())
    for step in range(steps):
        for parameter in net.parameters():
            parameter.grad = torch.full_like(parameter, step + 1)
        optimizer.step()
    return net, ProtectedState(model=net, optimizer=optimizer)


def test_a_fresh_optimizer_gets_sharded_moments():
    with rank_of(1, (2,)) as mesh:
        layout, data, small = take(trained_fsdp(mesh, steps=2)[1])
        net, state = trained_fsdp(mesh, steps=0)
        state.load(layout, [data], small)
        assert take(state) == (layout, data, small)
        moment = state.targets().tensors({"optimizer/state/model/first.weight/exp_avg":
                                          ("float32", (8, 5))})  # fmt: skip
        ((_, tensor),) = moment.items()
        assert isinstance(tensor, DTensor)
        assert tensor.placements == net.get_parameter("first.weight").placements  # type: ignore[attr-defined]


def test_another_ranks_boxes_are_refused_untouched():
    with rank_of(1, (2,)) as mesh:
        layout, data, small = take(trained_fsdp(mesh)[1])
    with rank_of(0, (2,)) as mesh:
        _, state = trained_fsdp(mesh, steps=0)
        before = take(state)
        with pytest.raises(StateChanged, match=r"model/first.bias: .*load_state loads it"):
            state.load(layout, [data], small)
        bare = StateLayout.of_boxes(e.signature for e in layout.entries if "state" in e.name)
        mine = StateLayout.of_boxes([e.signature for e in before[0].entries])
        mixed = StateLayout.of_boxes([e.signature for e in (*mine.entries, *bare.entries)])
        with pytest.raises(StateChanged, match=r"first.bias/exp_avg: the state was sharded other"):
            state.load(mixed, [bytes(mixed.total_bytes)], small)
        assert take(state) == before


def test_the_optimizer_goes_by_names_and_its_moments_by_boxes():
    with rank_of(1, (2, 2)) as mesh:
        net = tp_fsdp(mesh)
        optimizer = torch.optim.AdamW(net.parameters())
        for parameter in net.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        boxes = {
            e.name: (e.offsets, e.shape, e.global_shape)
            for e in ProtectedState(model=net, optimizer=optimizer).layout().entries
        }
    state = "optimizer/state/model/first.weight"
    assert boxes["model/first.weight"] == ((4, 0), (2, 5), (8, 5))
    for key in ("exp_avg", "exp_avg_sq"):
        assert boxes[f"{state}/{key}"] == boxes["model/first.weight"]
    assert boxes[f"{state}/step"] == ((), (), ())
    assert boxes["model/count"] == ((0,), (2,), (2,))


def test_a_shard_that_is_swapped_under_its_dtensor_is_noticed():
    with rank_of(0, (2,)) as mesh:
        net = Net()
        fully_shard(net, mesh=mesh)
        state = ProtectedState(model=net)
        first = state.picture()
        assert state.picture().live[:1] == first.live[:1]
        weight: DTensor = net.first.weight  # type: ignore[assignment]
        weight._local_tensor = weight._local_tensor.clone()
        with pytest.raises(StateChanged, match=r"model/first.weight moved"):
            state.picture()


def test_parameters_gathered_by_an_evaluation_are_sharded_again():
    with rank_of(0, (2,)) as mesh:
        net = Net()
        fully_shard(net, mesh=mesh)
        state = ProtectedState(model=net)
        before = state.layout()
        with torch.no_grad():
            net(torch.zeros(1, 5))
        assert not isinstance(net.first.weight, DTensor)
        assert state.picture().layout == before
        assert isinstance(net.first.weight, DTensor)


def test_a_dtensor_inside_a_value_is_refused():
    class Kept:
        def __init__(self, value: torch.Tensor) -> None:
            self.value = value

        def state_dict(self) -> dict[str, object]:
            return {"a": [self.value]}

        def load_state_dict(self, state: dict[str, object]) -> None: ...

    with rank_of(0, (2,)) as mesh:
        tensor = distribute_tensor(torch.zeros(4), mesh, [Shard(0)], src_data_rank=None)
        with pytest.raises(UsageError, match=r"kept/a/0 is a DTensor inside a value"):
            ProtectedState(model=nn.Linear(1, 1), kept=Kept(tensor)).layout()


PLAIN = """
import sys, torch
from pathlib import Path
from ftkit.checkpoint.capture import Capture
from ftkit.checkpoint.load import load_state
from ftkit.checkpoint.sources import SnapshotSource
from ftkit.checkpoint.state import ProtectedState
from tests.checkpoint.helpers import make_arena
# No optimizer: torch's import much of torch when they are made.
state = ProtectedState(model=torch.nn.Linear(2, 2))
with make_arena(Path(sys.argv[1]), state.layout()) as arena:
    with Capture(arena, state) as capture:
        capture.begin(1, 1)
    head = arena.head(arena.newest())
    state.load(head.layout, arena.blocks(head), head.small)
    load_state(state, [SnapshotSource.of_arena(arena, 1)])
assert "torch.distributed.tensor" not in sys.modules
"""


@pytest.mark.multiproc
def test_replicated_state_never_imports_what_it_does_not_need(tmp_path):
    root = Path(__file__).parents[2]
    code = [sys.executable, "-c", PLAIN, str(tmp_path / "arena")]
    subprocess.run(code, cwd=root, check=True, timeout=60)
