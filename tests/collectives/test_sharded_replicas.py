"""Replicas of shards (HSDP): where torch keeps their group, and what is done if it does not."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.testing._internal.distributed.fake_pg import FakeStore

from ftkit.collectives.sharded import ShardedReducer
from ftkit.collectives.sharded_unit import Unit

WIDTH = 8


@pytest.fixture
def model() -> Iterator[nn.Module]:
    """Two replicas of two shards, in a world of whom only rank 0 is real."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    try:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        linear = nn.Linear(WIDTH, WIDTH, bias=False)
        fully_shard(linear, mesh=mesh)
        yield linear
    finally:
        dist.destroy_process_group()


class Step:
    """One slot a rank, every rank's as ours."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.log = model, list[str]()
        self.reducer = ShardedReducer(
            [model], slots=4, world_size=4, rank=0, exchange=self._exchange, mean=False
        )

    def _exchange(self, out: torch.Tensor, rows: torch.Tensor, *, last: bool) -> Any:
        self.log.append("sent")

        class Sent:
            def wait(_) -> None:  # noqa: N805
                self.log.append("waited")
                out.copy_(rows.view(4, -1)[0].repeat(4))

        return Sent()

    def backward(self) -> None:
        self.reducer.start_slot(0, last=True)
        self.model(torch.ones(1, WIDTH)).sum().backward()

    def ours_is_right(self) -> bool:
        """Of our shard, the cut that this replica sums: of ones, four ranks'."""
        (weight,) = self.model.parameters()
        assert weight.grad is not None
        local: torch.Tensor = weight.grad._local_tensor  # type: ignore[attr-defined]
        mine, others = local.flatten().chunk(2)
        return bool(mine.eq(4.0).all() and others.eq(0.0).all())


def test_this_torch_keeps_the_group_of_replicas_where_we_stand_in_for_it(model: nn.Module) -> None:
    step = Step(model)
    (unit,) = step.reducer._units
    assert unit._replicas is not None, (
        f"torch {torch.__version__} has moved FSDPParamGroup._all_reduce_process_group or "
        "mesh_info.replicate_process_group: the backward pass of HSDP waits for each exchange "
        "until Unit.stand_in_for_replicas finds them again"
    )
    step.backward()
    assert step.log == ["sent"], "FSDP2 adds replicas up by another group than it is said to"
    step.reducer.finish(held=1)
    assert step.log == ["sent", "waited"]
    assert step.ours_is_right()


@pytest.mark.parametrize("kept", ["elsewhere", "and asked for elsewhere"])
def test_where_it_is_not_each_exchange_is_waited_for(
    model: nn.Module, kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (group,) = model._get_fsdp_state()._fsdp_param_groups  # type: ignore[operator]
    real = group.mesh_info.replicate_process_group
    if kept == "elsewhere":
        monkeypatch.delattr(group.mesh_info, "replicate_process_group")
    monkeypatch.setattr(FSDPParamGroup, "_all_reduce_process_group", property(lambda _: real))
    step = Step(model)
    step.backward()
    assert step.log == ["sent", "waited"]
    step.reducer.finish(held=1)
    assert step.ours_is_right()
    assert getattr(group.mesh_info, "replicate_process_group", real) is real


def test_a_module_that_says_nothing_of_its_groups_is_left_alone() -> None:
    unit = Unit(None, [], slots=1, world_size=4, rank=0)  # type: ignore[arg-type]
    unit.stand_in_for_replicas(nn.Linear(1, 1))
    assert unit._replicas is None
