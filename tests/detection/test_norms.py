"""Gradients that are wrong without being absurd name their rank; training itself names nobody."""

import math
from collections.abc import Callable
from typing import Any

import pytest

from ftkit.core.verdict import Fault, Verdict
from ftkit.detection.norms import BLOCK_STEPS
from tests.detection.pace import Pace

WARM = 25 * BLOCK_STEPS


class Gradients(Pace):
    """A job whose gradients shrink as it trains and differ from rank to rank by `sigma`."""

    def __init__(self, size: int = 8, *, sigma: float = 0.3, **more: Any) -> None:
        super().__init__(size, **more)
        self.sigma = sigma

    def train(
        self, steps: int, factor: Callable[[int, int], float] = lambda seat, step: 1.0
    ) -> list[Verdict]:
        """What was said of gradients: the last word on each seat."""

        def change(seat: int, step: int) -> dict[str, Any]:
            usual = 3.0 * math.exp(-self.step / 500)
            noise = self.rng.lognormvariate(0.0, self.sigma)
            return {"grad_norm": usual * noise * factor(seat, step)}

        said = {
            (v.fault, v.seat): v
            for standing in self.play(steps, change=change)
            for v in standing
            if v.fault is Fault.SDC
        }
        return list(said.values())


def of(seat: int, by: float) -> Callable[[int, int], float]:
    return lambda who, step: by if who == seat else 1.0


@pytest.mark.parametrize("size", [3, 8])
@pytest.mark.parametrize("by", [2.5, 0.4])
def test_a_rank_whose_gradients_change_for_good_is_suspected_and_nobody_else(
    size: int, by: float
) -> None:
    job = Gradients(size, sigma=0.1)
    assert job.train(WARM) == []
    (verdict,) = job.train(96, of(1, by))
    assert (verdict.seat, verdict.suspected, verdict.evicts) == (1, True, False)
    assert verdict.evidence["factor"] == pytest.approx(by, rel=0.3)
    assert verdict.evidence["others"] == size - 1
    job.train(400)
    assert job.train(1) == [], "it is over"


def test_noisy_gradients_take_longer() -> None:
    job = Gradients(16, sigma=0.4)
    assert job.train(WARM) == []
    assert {v.seat for v in job.train(100, of(5, 2.5))} == {5}


@pytest.mark.parametrize("seed", range(3))
def test_noise_alone_accuses_nobody(seed: int) -> None:
    assert Gradients(16, sigma=0.4, seed=seed, step_s=10.0).train(1000) == []


def test_what_happens_to_all_or_once_or_has_always_been_so_is_none() -> None:
    job = Gradients()
    # Two shards of one gradient, say: of different size from the beginning.
    shards = of(3, 5.0)
    assert job.train(WARM, shards) == []
    assert job.train(30, lambda seat, step: 20.0 * shards(seat, step)) == [], "a loss spike"
    assert (
        job.train(60, lambda s, step: shards(s, step) * (99.0 if (s, step) == (2, 30) else 1)) == []
    )


def test_who_plays_another_number_of_slots_is_no_peer() -> None:
    held = {0: 2}
    job = Gradients(slots=lambda seat: held.get(seat, 1), sigma=0.1)
    assert job.train(WARM, of(0, 0.7)) == [], "its mean is of more slots"
    held.clear()  # now it is as the others are
    assert job.train(WARM) == []


def test_one_with_few_peers_or_no_norm_is_not_judged() -> None:
    job = Gradients(2, sigma=0.1)
    job.train(WARM)
    assert job.train(50, of(1, 3.0)) == []
    job = Gradients(4, sigma=0.1)
    job.train(WARM)
    assert job.train(50, of(1, math.nan)) == [], "that is said elsewhere"
