"""A stage from what is left: the right numbers, and never without being asked for and told."""

import logging
from typing import Any

import pytest
import torch
from torch import nn

from ftkit.core.errors import UsageError
from ftkit.session.approximate import (
    StaleShard,
    copy_neighbour,
    fresh_optimizer,
    rebuild_between,
)


class Told(list[dict[str, Any]]):
    def __call__(self, kind: str, **fields: object) -> None:
        self.append({"kind": kind} | fields)


def stage(value: float, width: int = 3) -> nn.Linear:
    made = nn.Linear(width, width)
    for p in made.parameters():
        nn.init.constant_(p, value)
    return made


def trained(module: nn.Module) -> torch.optim.Adam:
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    for _ in range(3):
        module(torch.ones(2, 3)).sum().backward()
        optimizer.step()
    return optimizer


def test_the_stale_shard_comes_back_with_its_moments_and_only_it() -> None:
    module, other = stage(1.0), stage(2.0)
    optimizer = trained(module)
    kept = StaleShard(2, module, optimizer)
    kept.capture(100)
    weights = {k: v.clone() for k, v in module.state_dict().items()}
    moments = optimizer.state_dict()["state"][0]["exp_avg"].clone()
    module(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    told = Told()
    assert kept.restore(now=137, allow_approximate=True, tell=told) == 37
    assert all(torch.equal(v, weights[k]) for k, v in module.state_dict().items())
    assert torch.equal(optimizer.state_dict()["state"][0]["exp_avg"], moments)
    assert all((p == 2.0).all() for p in other.parameters())
    assert told == [{"kind": "approximate", "way": "stale-shard", "stage": 2, "age": 37}]
    # Training on does not change the copy: it can be needed twice.
    module(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    kept.restore(now=138, allow_approximate=True, tell=told)
    assert torch.equal(optimizer.state_dict()["state"][0]["exp_avg"], moments)


def test_a_stage_between_is_the_mean_by_squared_gradient_norms(
    caplog: pytest.LogCaptureFixture,
) -> None:
    lost, told = stage(0.0), Told()
    with caplog.at_level(logging.WARNING):
        rebuild_between(
            lost,
            stage(1.0),
            stage(2.0),
            norms=(1.0, 3.0),
            stage=3,
            allow_approximate=True,
            tell=told,
        )
    assert all(torch.allclose(p, torch.tensor(1.9)) for p in lost.parameters())
    assert "stage 3 is recovered by checkfree" in caplog.text
    assert [t["way"] for t in told] == ["checkfree"]
    rebuild_between(
        lost, stage(1.0), stage(2.0), norms=(0.0, 0.0), stage=3, allow_approximate=True, tell=told
    )
    assert all(torch.allclose(p, torch.tensor(1.5)) for p in lost.parameters())


def test_an_outer_stage_is_its_neighbours_copy() -> None:
    lost, told = stage(0.0), Told()
    copy_neighbour(lost, stage(4.0), stage=0, allow_approximate=True, tell=told)
    assert all((p == 4.0).all() for p in lost.parameters())
    assert len(told) == 1


def test_a_rebuilt_stage_begins_without_moments_and_a_little_faster() -> None:
    module = stage(1.0)
    optimizer = trained(module)
    for _ in range(2):
        fresh_optimizer(optimizer, lr=0.01)
    assert not optimizer.state
    assert [g["lr"] for g in optimizer.param_groups] == [pytest.approx(0.011)]


def test_nothing_is_touched_unless_it_is_allowed() -> None:
    lost, told = stage(0.0), Told()
    kept = StaleShard(1, lost, torch.optim.SGD(lost.parameters(), lr=1))
    with pytest.raises(UsageError, match="no older copy"):
        kept.restore(now=1, allow_approximate=True, tell=told)
    kept.capture(0)
    nn.init.constant_(lost.bias, 7.0)
    with pytest.raises(UsageError, match="allow_approximate=True"):
        kept.restore(now=1, allow_approximate=False, tell=told)
    with pytest.raises(UsageError, match="changes the result"):
        rebuild_between(
            lost, stage(1), stage(2), norms=(1, 1), stage=1, allow_approximate=False, tell=told
        )
    with pytest.raises(UsageError, match="changes the result"):
        copy_neighbour(lost, stage(1), stage=1, allow_approximate=False, tell=told)
    assert (lost.bias == 7.0).all()
    assert not told


def test_neighbours_of_another_shape_are_refused() -> None:
    told = Told()
    with pytest.raises(UsageError, match="differ in shape"):
        rebuild_between(
            stage(0),
            stage(1),
            stage(2, 4),
            norms=(1, 1),
            stage=1,
            allow_approximate=True,
            tell=told,
        )
    assert not told
