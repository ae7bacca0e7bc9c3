"""Random numbers by sample: the same in any micro-batch, and nothing drawn otherwise goes unseen."""

import random
from collections.abc import Callable, Iterator, Sequence

import numpy
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ftkit.core.errors import UsageError
from ftkit.core.ids import Slot
from ftkit.session.draws import SampleDraws


@pytest.fixture
def draws() -> Iterator[SampleDraws]:
    mode = SampleDraws()
    yield mode
    mode.stop()


Play = Callable[[torch.Tensor], torch.Tensor]


def played(draws: SampleDraws, play: Play, *groups: Sequence[int]) -> torch.Tensor:
    """What `play` makes of ones, micro-batch by micro-batch."""
    rows = []
    for group in groups:
        draws.begin(7, [Slot(s) for s in group])
        rows.append(play(torch.ones(len(group), 2, 6, 4)))
        draws.end()
    return torch.cat(rows)


@pytest.mark.parametrize(
    "play",
    [
        nn.Dropout(0.5),
        torch.rand_like,
        torch.randn_like,
        lambda x: torch.bernoulli(x / 2),
        lambda x: torch.empty_like(x).exponential_(),
        lambda x: torch.rand(len(x), 3) + torch.randn(len(x), 3),
        lambda x: nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=0.5),
        lambda x: torch.native_dropout(x, 0.5, True)[0],
        lambda x: nn.Dropout(0.5)(nn.Dropout(0.5)(x)),
    ],
    ids=[
        "dropout",
        "rand-like",
        "randn-like",
        "bernoulli",
        "exponential",
        "rand",
        "attention",
        "native-dropout",
        "twice",
    ],
)
def test_a_sample_draws_the_same_in_any_micro_batch(draws: SampleDraws, play: Play) -> None:
    whole = played(draws, play, (0, 1, 2, 3, 4))
    assert torch.equal(played(draws, play, (0, 1), (2,), (3, 4)), whole)
    assert not torch.equal(whole[0], whole[1]), "samples draw apart"
    assert not torch.equal(played(draws, play, (5, 6, 7, 8, 9)), whole)


def test_draws_of_one_pass_differ_and_an_activation_checkpoint_finds_them_again(
    draws: SampleDraws,
) -> None:
    drop, at = nn.Dropout(0.5), torch.ones(4, 64, requires_grad=True)
    draws.begin(1, [Slot(s) for s in range(4)])
    once, twice = drop(at), drop(at)
    draws.end()
    assert not torch.equal(once, twice)
    draws.begin(1, [Slot(s) for s in range(4)])
    again = checkpoint(lambda x: drop(drop(x)), at, use_reentrant=False)
    assert isinstance(again, torch.Tensor)
    again.sum().backward()
    draws.end()
    assert torch.equal(again, once * twice)
    assert at.grad is not None
    assert torch.equal(at.grad, once * twice), "backward computed with the same masks"


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: torch.randperm(4), "cannot be cut by sample"),
        (lambda: torch.multinomial(torch.ones(4), 2), "cannot be cut by sample"),
        (lambda: torch.rand(5), "first dimension"),
        (lambda: torch.rand(()), "first dimension"),
        (lambda: torch.empty(2).uniform_(generator=torch.Generator()), "leave generator= out"),
        (random.random, "drew from random"),
        (numpy.random.rand, "drew from random"),
    ],
    ids=["permutation", "multinomial", "five", "scalar", "generator", "random", "numpy"],
)
def test_what_is_not_drawn_by_sample_is_refused(
    draws: SampleDraws, draw: Callable[[], object], message: str
) -> None:
    def play() -> None:
        draw()
        draws.end()

    draws.begin(1, [Slot(0), Slot(1)])
    with pytest.raises(UsageError, match=message):
        play()
