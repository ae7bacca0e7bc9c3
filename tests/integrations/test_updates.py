"""The step loop turned inside out, in a world of one; and what a framework may see of the job."""

import os
from functools import partial

import pytest
import torch
from torch import nn

from ftkit.core.errors import UsageError
from ftkit.integrations import alone as integration
from ftkit.integrations.alone import alone as hidden
from ftkit.integrations.alone import local_index, require
from ftkit.integrations.updates import Given, Updates
from tests.session.alone import alone


def model() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(2, 1)


def backward(net: nn.Module, batch: torch.Tensor) -> None:
    net(batch).sum().backward()


BATCHES = [torch.randn(4, 2, generator=torch.Generator().manual_seed(s)) for s in range(3)]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_an_update_sums_over_the_batches_there_are(count: int) -> None:
    mine, plain = model(), model()
    optimizer = torch.optim.SGD(mine.parameters(), lr=0.1)

    def play(batch: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = mine(batch).square().mean()
        loss.backward()
        return loss.detach()

    with alone() as session:
        session.protect(model=mine, optimizer=optimizer)
        updates = Updates(session, slots=3, until=9, seed=0, mean=False)
        updates.begin()
        told = updates.play(BATCHES[:count], play)
        total = sum(plain(batch).square().mean() for batch in BATCHES[:count])
        assert isinstance(total, torch.Tensor)
        total.backward()
        assert told == pytest.approx(total.item())
        for p, q in zip(mine.parameters(), plain.parameters(), strict=True):
            assert p.grad is not None
            assert q.grad is not None
            torch.testing.assert_close(p.grad, q.grad)
        optimizer.step()
        assert session.step == 1, "counted before it was closed"
        updates.close()
        updates.end()
        with pytest.raises(UsageError, match="the job ended at step 1"):
            updates.play(BATCHES, play)


def test_what_is_drawn_between_updates_does_not_depend_on_what_was_drawn_before() -> None:
    drawn = []
    for noise in (0, 5):
        mine = model()
        with alone() as session:
            session.protect(model=mine, optimizer=torch.optim.SGD(mine.parameters(), lr=0.1))
            updates = Updates(session, slots=3, until=9, seed=0)
            torch.rand(noise)
            updates.play(BATCHES, partial(backward, mine))
            drawn.append(torch.rand(3))
            updates.end()
    assert torch.equal(*drawn)


def test_what_is_given_is_told_apart() -> None:
    given, other = Given(), Given()
    given.hold(BATCHES)
    other.hold(BATCHES[::-1])
    assert given.digest(1) != other.digest(1)  # type: ignore[arg-type]  # any step
    assert given.batch(1, 3) is None  # type: ignore[arg-type]


def test_the_launcher_s_variables_are_hidden_and_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with hidden():
        assert "RANK" not in os.environ
    assert os.environ["RANK"] == "3"
    assert "WORLD_SIZE" not in os.environ


def test_a_missing_framework_says_what_to_install() -> None:
    require("lightning", "os")
    with pytest.raises(
        ImportError, match=r"needs no_such_module: pip install 'ftkit\[lightning\]'"
    ):
        require("lightning", "os", "no_such_module")


def test_another_version_of_a_framework_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["lightning<3,>=2.6; extra == 'lightning'", "os>=9; extra == 'other'", "torch>=99"]
    found = {"lightning": "2.1.0", "torch": "2.13.0"}
    monkeypatch.setattr(integration, "requires", lambda name: asked)
    monkeypatch.setattr(integration, "version", found.__getitem__)
    with pytest.raises(ImportError, match=r"needs lightning<3,>=2.6, and 2.1.0 is installed: pip"):
        require("lightning", "os")
    found["lightning"] = "2.6.1"
    require("lightning", "os")


def test_one_that_is_alone_leads_its_node() -> None:
    with alone() as session:
        assert local_index(session) == 0
        assert session.seats == 1
