"""What protect(build=...) makes, and what it refuses; and that a digest of shards adds up."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import ftkit
from ftkit.core.errors import UsageError
from ftkit.session.builder import Builder, mesh_shape
from ftkit.session.consistency import breaks_bits
from ftkit.session.shards_digest import _mix, _signed, shards_digest
from tests.session.alone import Points, alone


@pytest.mark.parametrize(
    ("size", "shards", "shape"),
    [
        (4, None, (4,)), (1, None, (1,)),
        (4, 2, (2, 2)), (3, 2, (1, 3)), (2, 2, (1, 2)), (1, 2, (1, 1)),
        (6, 4, (1, 6)), (12, 4, (3, 4)), (9, 2, (3, 3)), (7, 3, (1, 7)), (3, 4, (1, 3)),
    ],
)  # fmt: skip
def test_a_copy_never_has_to_fit_fewer_ranks(size: int, shards: int | None, shape: Any) -> None:
    assert mesh_shape(size, shards) == shape


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        (torch.optim.AdamW, {}, ""),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, ""),
        (torch.optim.AdamW, {"foreach": True}, ""),
        (torch.optim.AdamW, {"fused": True}, "fused=True"),
        (torch.optim.LBFGS, {}, "more than one element"),
        (torch.optim.Adafactor, {}, "more than one element"),
    ],
)
def test_optimizers_whose_bits_depend_on_the_cut_are_refused(
    kind: Any, options: dict[str, Any], reason: str
) -> None:
    model = nn.Linear(4, 4)
    found = breaks_bits(model, kind(model.parameters(), **options))
    assert reason in found
    assert bool(reason) == bool(found)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"build": lambda mesh: None, "shards": 1}, "2 ranks or more"),
        ({"build": lambda mesh: None, "consistency": "some"}, "best_effort"),
        ({"build": lambda mesh: None, "model": nn.Linear(1, 1)}, "give none beside it"),
        ({"model": nn.Linear(1, 1), "shards": 2}, "go with build="),
        ({"model": nn.Linear(1, 1), "consistency": "best_effort"}, "holds whole"),
        (
            {"build": lambda mesh: None, "stages": True, "consistency": "scaled"},
            "nothing to resize",
        ),
        ({"model": nn.Linear(1, 1), "stages": True}, "go with build="),
        ({"build": lambda mesh: None, "shards": 2, "stages": True}, "not cut again"),
        ({}, "needs model= and optimizer="),
    ],
)
def test_what_protect_cannot_do_is_said_at_once(given: dict[str, Any], message: str) -> None:
    with alone() as session, pytest.raises(UsageError, match=message):
        session.protect(**given)


def test_only_whole_models_are_rebalanced_and_only_pipelines_cut() -> None:
    with alone() as session:
        session.protect(build=lambda mesh: ())
        with pytest.raises(UsageError, match="every rank holds whole"):
            session.steps(Points(), slots=2, slot_size=1, until=1, rebalance=True)
        with pytest.raises(UsageError, match="stages=True"):
            session.cut([1.0, 1.0])


def test_there_is_no_model_before_the_step_loop() -> None:
    with alone() as session:
        session.protect(build=lambda mesh: ())
        with pytest.raises(UsageError, match="in the step loop"):
            _ = session.model


def test_without_state_there_are_no_steps() -> None:
    with alone() as session, pytest.raises(UsageError, match="protect"):
        session.steps(Points(), slots=2, slot_size=1, until=1)


def test_a_digest_of_shards_is_that_of_names_places_and_bits() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 5)
    first = shards_digest([model])
    assert first == shards_digest([model])
    with torch.no_grad():
        model.weight[[0, 1]] = model.weight[[1, 0]].clone()
    moved = shards_digest([model])
    assert moved != first, "the same values in other places"
    with torch.no_grad():
        model.bias[4] = -model.bias[4]
    assert shards_digest([model]) != moved


def test_words_are_mixed_as_splitmix64_does() -> None:
    assert int(_mix(torch.tensor(0))) == _signed(0xE220A8397B1DCDAF)


def test_an_optimizer_that_cuts_by_itself_is_none_of_a_sharded_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.distributed.device_mesh.init_device_mesh", lambda *_, **__: None)
    model = nn.Linear(2, 2)
    optimizer = ftkit.ZeroOptimizer(model.parameters(), torch.optim.AdamW)
    builder = Builder(
        lambda mesh: (model, optimizer), shards=None, consistency="bitwise", device=None
    )
    world: Any = SimpleNamespace(size=2)
    with pytest.raises(UsageError, match="a ZeroOptimizer cuts the state of a model"):
        builder.make(world)
