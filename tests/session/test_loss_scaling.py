"""A GradScaler under a session: gradients that were scaled too far are its business, and nobody's fault."""

from typing import Any

import pytest
import torch
from torch import nn

from ftkit.core.errors import StepRolledBack
from tests.session.alone import Points, alone

STEPS, SLOTS = 12, 2


def parts(scale: float) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=4)
    return model, torch.optim.AdamW(model.parameters(), lr=0.05), scaler


def losses(model: nn.Module, batches: Any, scaler: Any) -> None:
    for x, y in batches:
        scaler.scale(nn.functional.mse_loss(model(x), y)).backward()


def update(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: Any) -> None:
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


def test_overflows_are_dropped_by_the_scaler_and_accuse_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told, seen = list[str](), list[list[Any]]()
    # With this the gradients are beyond what float32 holds; it halves until they are not.
    model, optimizer, scaler = parts(2.0**127)
    with alone() as session:
        monkeypatch.setattr(session.trace, "event", lambda kind, **_: told.append(kind))
        session.protect(model=model, optimizer=optimizer, scaler=scaler)
        for step in session.steps(Points(), slots=SLOTS, slot_size=2, until=STEPS, on_nan="skip"):
            with step:
                batches = list[Any]()
                for batch in step.batches():
                    batches.append(batch)
                    losses(model, [batch], scaler)
                assert step.committed, "the vote is over before the scaler touches anything"
                update(model, optimizer, scaler)
            seen.append(batches)
    assert not {"refused", "verdict", "finding"} & set(told)
    assert len(seen) == STEPS, "and no step is played twice"
    plain, other, own = parts(2.0**127)
    for batches in seen:
        losses(plain, batches, own)
        for param in plain.parameters():
            assert param.grad is not None
            param.grad /= SLOTS
        update(plain, other, own)
    assert scaler.get_scale() == own.get_scale() < 2.0**127
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_a_vote_that_fails_leaves_the_scaler_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or it would take the gradients of the second attempt for unscaled ones."""
    model, optimizer, scaler = parts(1024.0)
    failed, grown = list[int](), list[float]()
    with alone() as session:
        session.protect(model=model, optimizer=optimizer, scaler=scaler)
        for step in session.steps(Points(), slots=SLOTS, slot_size=2, until=3):
            vote = step._vote

            def fails(vote: Any = vote, step: Any = step) -> None:
                if step.index == 2 and not failed:
                    failed.append(step.index)
                    raise StepRolledBack("drill")
                vote()

            monkeypatch.setattr(step, "_vote", fails)
            with step:
                losses(model, step.batches(), scaler)
                update(model, optimizer, scaler)
            if step.committed:
                grown.append(max(p.detach().abs().max().item() for p in model.parameters()))
    assert failed == [2]
    assert len(grown) == 3
    assert max(grown) < 2, "unscaled twice, or never, it would have leapt"
