"""consistency="scaled" in a world of one: any micro-batches, the same training but for rounding."""

from itertools import chain
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from ftkit.core.errors import UsageError
from ftkit.session.session import Session
from tests.session.alone import Points, alone, learn, net


def trained(slots: int, slot_size: int, *, mean: bool = True) -> tuple[torch.Tensor, list[Any]]:
    """Parameters after twenty steps with dropout, and what each micro-batch held."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 16), nn.Dropout(0.3), nn.Linear(16, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    seen, losses = [], []
    with alone() as session:
        session.protect(model=model, optimizer=optimizer, consistency="scaled")
        for step in session.steps(Points(), slots=slots, slot_size=slot_size, until=20, mean=mean):
            with step:
                for x, y in step.batches():
                    seen.append(x[:, 0].tolist())
                    off = (model(x) - y).square()
                    loss = off.mean() if mean else off.sum() / (slots * slot_size)
                    loss.backward()
                    step.record(loss)
                optimizer.step()
            losses.append(step.loss)
    return torch.cat([p.detach().flatten() for p in model.parameters()]), [seen, losses]


@pytest.mark.parametrize("mean", [True, False])
def test_the_size_of_micro_batches_changes_nothing_but_rounding(mean: bool) -> None:
    one, (batches, losses) = trained(6, 2, mean=mean)
    other, (fewer, same) = trained(3, 4, mean=mean)
    assert [len(b) for b in batches] == [2] * 120
    assert [len(b) for b in fewer] == [4] * 60
    assert [*chain(*batches)] == [*chain(*fewer)]
    assert losses == pytest.approx(same, rel=1e-5)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    assert not torch.equal(one, torch.zeros_like(one))


@pytest.mark.parametrize(
    ("data", "model", "message"),
    [
        (DataLoader(Points(), batch_size=2), nn.Linear(2, 1), "made already"),  # type: ignore[arg-type]
        (Points(), net(), "GroupNorm"),
    ],
)
def test_what_cannot_be_resized_is_refused_at_the_start(
    data: Any, model: nn.Module, message: str
) -> None:
    def begin(session: Session) -> None:
        optimizer = torch.optim.SGD(model.parameters())
        session.protect(model=model, optimizer=optimizer, consistency="scaled")
        session.steps(data, slots=2, slot_size=None if "made" in message else 2, until=1)

    with alone() as session, pytest.raises(UsageError, match=message):
        begin(session)


class Counting(nn.Module):
    """A layer that remembers something of each micro-batch."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(2, 1)
        self.count: torch.Tensor
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += len(x)
        out: torch.Tensor = self.line(x)
        return out


def test_a_buffer_that_depends_on_the_micro_batch_is_refused_in_the_first_step() -> None:
    model = Counting()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with alone() as session:
        session.protect(model=model, optimizer=optimizer, consistency="scaled")
        step = next(session.steps(Points(), slots=2, slot_size=2, until=1))
        with pytest.raises(UsageError, match="a buffer of the model changes"), step:
            learn(model, step)


def test_an_attempt_that_ends_early_leaves_torch_drawing_as_ever() -> None:
    model = nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.5), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with alone() as session:
        session.protect(model=model, optimizer=optimizer, consistency="scaled")
        step = next(session.steps(Points(), slots=2, slot_size=2, until=1))
        with pytest.raises(RuntimeError, match="shapes"), step:
            model(next(step.batches())[1])  # in the middle of its first micro-batch
        assert torch.rand(3).shape == (3,)
