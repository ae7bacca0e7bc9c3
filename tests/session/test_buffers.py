"""StepBuffers: what forward passes change belongs to the step, whoever plays which slot."""

import pytest
import torch
from torch import nn

from ftkit.collectives.slots import assign
from ftkit.session.buffers import StepBuffers

SLOTS = 5


class Odd(nn.Module):
    """Buffers as people write them: replaced, not contiguous, lazily made, empty, shared."""

    def __init__(self) -> None:
        super().__init__()
        self.average: torch.Tensor = nn.Buffer(torch.zeros(2))
        self.turned = nn.Buffer(torch.arange(6.0).view(2, 3).t())
        self.calls: torch.Tensor = nn.Buffer(torch.tensor(0), persistent=False)
        self.nothing = nn.Buffer(torch.empty(0))
        self.same = self.calls
        self.register_buffer("late", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.detach().mean()
        self.average = self.average * 0.9 + mean * 0.1
        self.turned.mul_(1.0 + mean)
        self.calls += 1
        return x


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), Odd())


def forward(model: nn.Module, step: int, slot: int) -> None:
    model(torch.randn(6, 3, generator=torch.Generator().manual_seed(step * 100 + slot)))


def play(ranks: int, steps: int = 4, *, torn_at: int | None = None) -> list[list[bytes]]:
    """Each rank's buffers after `steps` steps; at `torn_at` an attempt is cut in half."""
    models = [build() for _ in range(ranks)]
    parts = assign(SLOTS, ranks)
    for step in range(steps):
        for attempt in range(2 if step == torn_at else 1):
            held = [StepBuffers([m]) for m in models]
            torn = step == torn_at and attempt == 0
            for model, buffers, part in zip(models, held, parts, strict=True):
                for slot in list(part)[: 1 if torn else None]:
                    buffers.rewind()
                    forward(model, step, slot)
                    if slot == 0:
                        buffers.keep()
            if torn:
                for buffers in held:
                    buffers.rewind()
                continue
            given: list[torch.Tensor] = []
            held[0].share(lambda t, given=given: given.append(t.clone()))  # type: ignore[misc]
            for buffers in held[1:]:
                queue = iter(given)
                buffers.share(lambda t, queue=queue: t.copy_(next(queue)))  # type: ignore[misc]
    return [
        [b.contiguous().numpy().tobytes() for _, b in m.named_buffers(remove_duplicate=False)]
        for m in models
    ]


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_the_bits_do_not_depend_on_the_number_of_ranks(ranks: int) -> None:
    (alone,) = play(1)
    assert play(ranks) == [alone] * ranks


@pytest.mark.parametrize("ranks", [1, 3])
def test_an_attempt_cut_in_half_leaves_nothing(ranks: int) -> None:
    assert play(ranks, torn_at=2) == play(ranks)


def test_they_are_those_of_slot_0_as_in_plain_training() -> None:
    plain = build()
    for step in range(4):
        forward(plain, step, 0)
    named = plain.named_buffers(remove_duplicate=False)
    assert play(3)[0] == [b.contiguous().numpy().tobytes() for _, b in named]


def test_the_tensors_stay_the_same_objects() -> None:
    model = build()
    before = {n: id(b) for n, b in model.named_buffers()}
    buffers = StepBuffers([model])
    buffers.rewind()
    forward(model, 0, 0)
    assert {n: id(b) for n, b in model.named_buffers()} != before
    buffers.keep()
    buffers.share(lambda _: None)
    assert {n: id(b) for n, b in model.named_buffers()} == before


def test_a_module_without_buffers_costs_nothing() -> None:
    told: list[torch.Tensor] = []
    buffers = StepBuffers([nn.Linear(1, 1)])
    buffers.rewind()
    buffers.keep()
    buffers.share(told.append)
    assert told == []
