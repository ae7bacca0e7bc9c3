"""A pipeline that swaps its outer stages, on the one rank that is left of four."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ftkit.collectives.handle import finished
from ftkit.core.errors import UsageError
from ftkit.session.ends import Ends
from ftkit.session.layers import Layers
from ftkit.session.session import _allowed
from ftkit.session.swapped import SwappedSchedule
from tests.session.alone import alone

COSTS, SLOTS = [0.5, 1, 1, 1, 1, 0.5], 3
EVEN, ODD = (0, 1, 2, 3, 4, 5), (0, 2, 1, 4, 3, 5)


def stand_in() -> Layers:
    group: Any = SimpleNamespace(
        rank=0, size=1, world=SimpleNamespace(generation=1), exchange=lambda told: finished([told])
    )
    layers = Layers(group, SimpleNamespace(event=lambda *_, **__: None), 4)  # type: ignore[arg-type]
    layers.swap_wanted = True
    layers.ends = SimpleNamespace(travel=list)  # type: ignore[assignment]
    return layers


def modules() -> dict[int, nn.Module]:
    torch.manual_seed(0)
    return {i: nn.Sequential(nn.Linear(3, 3), nn.Tanh()) for i in range(6)}


def mse(y: Tensor, target: Tensor) -> Tensor:
    return (y - target).square().mean()


def made(layers: Layers, held: dict[int, nn.Module]) -> SwappedSchedule:
    hidden = torch.zeros(2, 3)
    return SwappedSchedule(layers, held, hidden=hidden, loss_fn=mse, rank=0, slots=SLOTS)


class Played:
    """Stands for the open step: runs a layer, and notes which."""

    def __init__(self) -> None:
        self.layers: dict[int, list[int]] = {}

    def layer(self, index: int, module: nn.Module, x: Tensor, *, slot: int) -> Tensor:
        self.layers.setdefault(slot, []).append(index)
        y: Tensor = module(x)
        return y


def test_every_other_slot_meets_the_layers_of_the_outer_stages_in_the_other_order() -> None:
    layers, held, step = stand_in(), modules(), Played()
    assert layers.cut(COSTS) == (0, 6)
    inputs = [torch.randn(2, 3) for _ in range(SLOTS)]
    targets = [torch.randn(2, 3) for _ in range(SLOTS)]
    losses = made(layers, held).play(step, inputs, targets)  # type: ignore[arg-type]
    assert step.layers == {0: [*EVEN], 1: [*ODD], 2: [*EVEN]}
    plain = modules()
    for slot, (x, target) in enumerate(zip(inputs, targets, strict=True)):
        y = x
        for i in ODD if slot % 2 else EVEN:
            y = plain[i](y)
        loss = mse(y, target)
        loss.backward()
        assert torch.equal(losses[slot], loss.detach())
    for i, module in held.items():
        for mine, his in zip(module.parameters(), plain[i].parameters(), strict=True):
            assert mine.grad is not None
            assert his.grad is not None
            assert torch.equal(mine.grad, his.grad)
    layers.look(None)


def test_slots_that_were_played_otherwise_teach_nobody_and_are_refused() -> None:
    layers = stand_in()
    layers.cut(COSTS)
    with pytest.raises(UsageError, match=r"session\.swapped"):
        layers.look(None)
    layers.swap_wanted = False
    layers.look(None)


def test_layers_of_another_cut_are_refused() -> None:
    layers, held = stand_in(), modules()
    layers.cut(COSTS)
    del held[3]
    with pytest.raises(UsageError, match=r"layers \[0, 1, 2, 4, 5\], and this rank holds"):
        made(layers, held)
    with pytest.raises(ValueError, match="CheckFree"):
        layers.cut([9.0, 1, 1, 1, 1, 9.0])


def test_a_slot_that_lacks_its_input_or_target_is_refused() -> None:
    layers, step = stand_in(), Played()
    layers.cut(COSTS)
    schedule = made(layers, modules())
    x = [torch.randn(2, 3) for _ in range(SLOTS)]
    for inputs, targets, said in ((x[:2], x, "2 inputs"), (x, [*x, x[0]], "4 targets")):
        with pytest.raises(UsageError, match=f"{said}, and a step has 3 slots"):
            schedule.play(step, inputs, targets)  # type: ignore[arg-type]
    assert not step.layers


def test_the_schedule_of_a_world_that_is_over_is_refused() -> None:
    layers, step = stand_in(), Played()
    layers.cut(COSTS)
    old = made(layers, modules())
    layers.cut(COSTS)
    made(layers, modules())
    x = [torch.randn(2, 3) for _ in range(SLOTS)]
    with pytest.raises(UsageError, match="a world that is over"):
        old.play(step, x, x)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("layers", ""),
        ("blocks.0", "of layer 1 as given"),  # the first number in a name is not the layer's
        ("embedding", "embedding.weight is of layer 0 as given"),
        ("norm", "norm.weight is of no layer"),
    ],
)
def test_tensors_whose_names_do_not_tell_their_layer_are_refused_at_once(
    name: str, said: str
) -> None:
    layers, held = stand_in(), modules()
    model = nn.Module()
    if name == "embedding":
        held[0] = model.embedding = nn.Linear(3, 3)
    numbered = nn.ModuleDict({str(i): m for i, m in held.items()})
    if name == "blocks.0":
        model.blocks = nn.ModuleList([numbered])
    else:
        model.layers = numbered
    if name == "norm":
        model.norm = nn.LayerNorm(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def built() -> None:
        layers.cut(COSTS)
        made(layers, held)
        Ends(layers._group, model, optimizer, bounds=layers.bounds, numbers=layers.numbers)

    if not said:
        built()
        return
    with pytest.raises(UsageError, match=said):
        built()


def test_it_has_to_be_asked_for() -> None:
    with alone() as session, pytest.raises(UsageError, match=r'"checkfree\+"'):
        session.swapped({}, hidden=torch.zeros(1), loss_fn=mse)
    with pytest.raises(UsageError, match="give True"):
        _allowed("checkfree+", stages=False)
    with pytest.raises(UsageError, match="give True"):
        _allowed("stale", stages=True)
