"""A shadow that replays what the owner's optimizer did holds what the owner holds, bit for bit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ftkit.checkpoint.box import Box
from ftkit.checkpoint.shadow import Moving, Owned, Shadow, fill, hash_of, hyper_of
from ftkit.checkpoint.state import ProtectedState, bytes_of
from ftkit.core.errors import ProtocolError, UsageError

Make = Callable[[Any], torch.optim.Optimizer]


class Owner:
    """Two layers and an optimizer with two groups; the second layer moves."""

    def __init__(self, make: Make, *, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(
            nn.Linear(5, 7), nn.Sequential(nn.Linear(7, 6, bias=True), nn.BatchNorm1d(6))
        )
        params = list(self.model.parameters())
        self.optimizer = make([{"params": params[1::2]}, {"params": params[::2], "lr": 0.003}])
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda n: 0.9**n)
        self.state = ProtectedState(model=self.model, optimizer=[self.optimizer])

    def step(self) -> tuple[list[torch.Tensor | None], Any]:
        """One step; what it used."""
        self.model(torch.randn(4, 5)).square().sum().backward()
        owned = self.owned
        gradients = [None if p.grad is None else p.grad.clone() for p in owned.trained]
        hyper = hyper_of(self.optimizer)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        return gradients, hyper

    @property
    def owned(self) -> Owned:
        return Owned.of(self.state, [self.model[1]], self.optimizer)

    @property
    def hashes(self) -> dict[str, int]:
        owned = self.owned
        return {m.name: hash_of(t) for m, t in zip(owned.moving, owned.live, strict=True)}


def shadow_of(owner: Owner, target: Owner) -> Shadow:
    owned = owner.owned
    shadow = Shadow([Moving.from_json(m.to_json()) for m in owned.moving], target.optimizer)
    for m, tensor in zip(owned.moving, owned.live, strict=True):
        fill(shadow.tensors[m.name], memoryview(bytearray(bytes_of(tensor.contiguous()))))
    shadow.complete()
    return shadow


def follow(shadow: Shadow, owner: Owner, steps: int = 6) -> None:
    for _ in range(steps):
        gradients, hyper = owner.step()
        shadow.replay(gradients, hyper, stepped=True)
        buffers = [m.name for m in shadow.moving if m.early]
        for name, value in zip(buffers, owner.owned.buffers, strict=True):
            shadow.tensors[name].copy_(value)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
        lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True),
        lambda p: torch.optim.Adagrad(p, lr=0.01),
        lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    ],
    ids=["adamw", "amsgrad", "nesterov", "sgd", "rmsprop", "adagrad", "foreach"],
)
def test_replay_comes_to_the_same_bits(make: Make) -> None:
    owner, target = Owner(make), Owner(make, seed=9)
    for _ in range(3):
        owner.step()
        target.step()
    before = {n: hash_of(p) for n, p in target.model.named_parameters()}
    shadow = shadow_of(owner, target)
    assert shadow.hashes() == owner.hashes
    follow(shadow, owner)
    assert shadow.hashes() == owner.hashes
    assert {n: hash_of(p) for n, p in target.model.named_parameters()} == before
    assert len(target.optimizer.param_groups[0]["params"]) == 3, "nothing was added to it"


def test_a_parameter_without_gradient_and_a_step_left_out() -> None:
    def adam(p: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(p, lr=0.01)

    owner, target = Owner(adam), Owner(adam)
    owner.step()
    owner.model[1][0].weight.requires_grad_(False)  # type: ignore[index]
    shadow = shadow_of(owner, target)
    follow(shadow, owner, 2)
    shadow.replay([], [], stepped=False)
    assert shadow.hashes() == owner.hashes


def test_a_wrong_gradient_shows() -> None:
    def adam(p: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(p, lr=0.01)

    owner, target = Owner(adam), Owner(adam)
    owner.step()
    shadow = shadow_of(owner, target)
    gradients, hyper = owner.step()
    assert gradients[0] is not None
    gradients[0].view(-1)[3] += 1e-3
    shadow.replay(gradients, hyper, stepped=True)
    wrong = {n for n, h in shadow.hashes().items() if owner.hashes[n] != h}
    name = next(m.name for m in shadow.moving if m.group >= 0)
    assert name in wrong
    buffers = {m.name for m in shadow.moving if m.early}
    assert all(name in n for n in wrong - buffers), "that one and what the optimizer keeps of it"
    shadow.keep(set(owner.hashes) - wrong)
    assert not wrong & {e.name for e in shadow.entries()}


def test_it_is_read_as_a_source() -> None:
    def sgd(p: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(p, lr=0.1)

    owner = Owner(sgd)
    shadow = shadow_of(owner, Owner(sgd))
    name = next(e.name for e in shadow.entries() if e.name.endswith("1.0.weight"))
    out = bytearray(2 * 7 * 4)
    shadow.read(name, Box((3, 0), (2, 7)), memoryview(out))
    weight: torch.Tensor = owner.model[1][0].weight  # type: ignore[index]
    assert bytes(out) == bytes(bytes_of(weight[3:5].contiguous()))


def test_what_cannot_move_is_said() -> None:
    owner = Owner(lambda p: torch.optim.SGD(p, lr=0.1))
    weight: torch.Tensor = owner.model[1][0].weight  # type: ignore[index]
    owner.optimizer.state[weight]["seen"] = 3
    with pytest.raises(UsageError, match="more than tensors"):
        _ = owner.owned
    few = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    with pytest.raises(ProtocolError, match="1 groups"):
        Shadow([Moving("x", "float32", (2,), "cpu", 1, False)], few)
    for wrong in (None, [], ["x", "floot", [1], "cpu", 0, False], ["x", "float32", 3, "cpu", 0, 0]):
        with pytest.raises(ProtocolError):
            Moving.from_json(wrong)
