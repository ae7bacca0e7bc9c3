"""A loss that leaps is said when its gradients leap too, and more than once."""

import math
import random

from ftkit.detection.spikes import STEPS_MIN, Spikes


def falling(seed: int, step: int) -> tuple[float, float]:
    """The loss and the norm of a training that goes well, with the noise of small batches."""
    rng = random.Random(f"{seed} {step}")
    return 4 * step**-0.2 * math.exp(rng.gauss(0, 0.05)), math.exp(rng.gauss(0, 0.2))


def found(leaps: dict[int, tuple[float, float]], *, seed: int = 0, steps: int = 300) -> list[int]:
    spikes, seen = Spikes(), []
    for step in range(1, steps + 1):
        loss, norm = falling(seed, step)
        by_loss, by_norm = leaps.get(step, (1.0, 1.0))
        if (spike := spikes.update(step, loss * by_loss, norm * by_norm)) is not None:
            assert spike.loss_z > 8
            seen.append(step)
    return seen


def test_a_training_that_goes_well_has_none() -> None:
    assert [found({}, seed=seed, steps=2000) for seed in range(20)] == [[]] * 20


def test_two_leaps_in_three_steps_are_said_at_the_second() -> None:
    assert found({200: (10, 10), 201: (10, 10)}) == [201]
    assert found({200: (10, 10), 202: (10, 10)}) == [202]
    assert found({200: (10, 10), 203: (10, 10)}) == []


def test_one_step_or_one_of_both_is_not_enough() -> None:
    assert found({200: (10, 10)}) == []
    assert found(dict.fromkeys(range(200, 205), (10.0, 1.0))) == []
    assert found(dict.fromkeys(range(200, 205), (10.0, 1.5))) == []
    assert found(dict.fromkeys(range(200, 205), (1.0, 10.0))) == []


def test_nothing_is_usual_before_some_steps_and_what_has_no_logarithm_is_passed_over() -> None:
    assert found(dict.fromkeys(range(2, STEPS_MIN), (50.0, 50.0)), steps=STEPS_MIN) == []
    spikes = Spikes()
    for value in (0.0, -1.0, math.nan, math.inf):
        assert spikes.update(1, value, 1.0) is None
        assert spikes.update(1, 1.0, value) is None
