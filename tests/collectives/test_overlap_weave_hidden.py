"""What a woven stack hides of its communication, and when it leaves the batch whole."""

from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ftkit.collectives.modelled import ModelledGroup, Network
from ftkit.collectives.overlap import crossing, weave_run
from ftkit.collectives.overlap.norm import add_rms_norm, rms_norm_backward
from ftkit.collectives.overlap.tuning import SplitTuner
from ftkit.collectives.overlap.weave import Layer

from .ranks import on
from .weaving import WIDTH, woven


class Slow(nn.Module):
    """A layer that takes a time of its own for each sample, and as long twice in backward."""

    def __init__(self, network: Network, sample_s: float) -> None:
        super().__init__()
        self.network, self.sample_s = network, sample_s

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        class Sleep(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
                self.network.sleep(self.sample_s * x.shape[0])
                return x.clone()

            @staticmethod
            def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
                self.network.sleep(2 * self.sample_s * grad.shape[0])
                return grad

        result: torch.Tensor = Sleep.apply(x)
        return result


BATCH, TOKENS, DEEP = 8, 16, 8
#: Bytes that each of two ranks sends and receives around a layer: a scatter and a gather.
AROUND = BATCH * TOKENS * WIDTH * 4


def step_s(
    split: Any,
    *,
    compute_s: float,
    exchange_s: float,
    steps: int = 1,
    network: Network | None = None,
) -> list[float]:
    """Seconds of each training step of a stack whose layers compute and exchange for so long."""
    network = network or Network(2, rate=AROUND / exchange_s)

    def rank(group: ModelledGroup) -> list[float]:
        stack = [Layer(torch.ones(WIDTH), Slow(network, compute_s / BATCH)) for _ in range(DEEP)]
        model, took = woven(group, stack, split), []
        for _ in range(steps):
            x = torch.randn(BATCH, TOKENS, WIDTH, requires_grad=True)
            began = network.now()
            model(x).sum().backward()
            took.append(network.now() - began)
        return took

    return [max(both) for both in zip(*on(network, rank), strict=True)]


@pytest.mark.parametrize("exchange_s", [0.006, 0.010, 0.014])
def test_two_halves_hide_three_quarters_of_the_communication(exchange_s: float) -> None:
    """Where the bound, computing beside communicating, is 1.3 and more."""
    (whole,) = step_s(False, compute_s=0.010, exchange_s=exchange_s)
    (halves,) = step_s(True, compute_s=0.010, exchange_s=exchange_s)
    computing, exchanging = 3 * DEEP * 0.010, 2 * DEEP * exchange_s
    hideable = min(computing, exchanging)
    assert (whole - halves) / hideable >= 0.75


def test_the_link_goes_on_while_a_half_is_normed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a latency, and norms that take their time, a half's rows leave while the other's wait."""
    exchange_s, normed_s = 0.010, 0.001
    network = Network(2, rate=AROUND / exchange_s, latency_s=0.0005)

    def slowly(act: Callable[..., Any]) -> Callable[..., Any]:
        def normed(x: torch.Tensor, *args: Any) -> Any:
            network.sleep(normed_s * x.numel() / (BATCH * TOKENS * WIDTH / 2))
            return act(x, *args)

        return normed

    monkeypatch.setattr(weave_run, "add_rms_norm", slowly(add_rms_norm))
    monkeypatch.setattr(weave_run, "rms_norm_backward", slowly(rms_norm_backward))
    monkeypatch.setattr(crossing, "_PIECE_BYTES", 1)
    (halves,) = step_s(True, compute_s=0.010, exchange_s=exchange_s, network=network)
    at_least = 3 * DEEP * 0.010
    # One half's first computing and another's last crossing have nothing beside them, twice. Between
    # them a crossing's trips, uncut, take a latency more than the other's computing hides; and a norm.
    more_s = 2 * DEEP * 0.0005 + normed_s
    assert halves - at_least < 2 * exchange_s + more_s


def test_a_call_is_judged_with_its_backward() -> None:
    """Forward alone would say that there is too little to hide."""
    network = Network(2, rate=AROUND / 0.010)

    def rank(group: ModelledGroup) -> list[float]:
        stack = [Layer(torch.ones(WIDTH), Slow(network, 0.010 / BATCH)) for _ in range(DEEP)]
        model = woven(group, stack, "auto")
        x = torch.randn(BATCH, TOKENS, WIDTH, requires_grad=True)
        took = []
        for _ in range(2):
            began = network.now()
            model(x).sum().backward()
            took.append(network.now() - began)
        (tuned,) = model._tuned.values()
        assert tuned.last is not None
        return [took[-1], tuned.last.total_s]

    for took, told in on(network, rank):
        assert told == pytest.approx(took, rel=1e-3)


def test_auto_splits_where_it_pays_and_not_where_it_does_not() -> None:
    *_, last = step_s("auto", compute_s=0.010, exchange_s=0.010, steps=12)
    (halves,) = step_s(True, compute_s=0.010, exchange_s=0.010)
    assert last == pytest.approx(halves)
    *_, last = step_s("auto", compute_s=0.010, exchange_s=0.0001, steps=11)
    (whole,) = step_s(False, compute_s=0.010, exchange_s=0.0001)
    assert last == pytest.approx(whole)


def test_halves_that_turn_out_slower_are_given_up() -> None:
    tuner = SplitTuner()
    for total_s in (9.0, 2.0, 2.1):
        assert not tuner.split
        ask = tuner.note(0.5, total_s)
    assert ask == [0.5, 2.0]
    tuner.agree(ask)
    turns = []
    while True:
        turns.append(tuner.split)
        if ask := tuner.note(0.1, 1.99 if tuner.split else 2.0):
            break
    assert turns == [True, False, True, False, True, False, True]
    assert ask == [2.0, 1.99, 2.0, 1.99]
    tuner.agree(ask)
    assert tuner.settled
    assert not tuner.split
    assert tuner.note(1.0, 1.0) == []


@pytest.mark.parametrize(("halves_s", "split"), [([1.5, 2.1, 2.1], False), ([1.8, 1.8, 2.5], True)])
def test_one_lucky_call_does_not_make_halves_faster(halves_s: list[float], split: bool) -> None:
    tuner, left = SplitTuner(), deque(halves_s)
    for _ in range(3):
        ask = tuner.note(0.5, 2.0)
    tuner.agree(ask)
    tuner.note(0.1, 9.0)  # the first in halves warms up
    while not (ask := tuner.note(0.1, left.popleft() if tuner.split else 2.0)):
        pass
    tuner.agree(ask)
    assert tuner.split is split
