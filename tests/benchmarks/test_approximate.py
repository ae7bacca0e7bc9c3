"""The benchmark of approximate recovery: its arithmetic, and that its stages train."""

import itertools
from collections.abc import Iterator

import pytest
import torch

from benchmarks.approximate import METHODS, equivalent, failures_of, rollback, train


def test_failures_are_the_same_for_all_and_never_of_neighbours() -> None:
    schedule = failures_of(3, 500, 0.2)
    assert schedule == failures_of(3, 500, 0.2)
    assert schedule[0] == []
    assert all(b - a > 1 for lost in schedule for a, b in itertools.pairwise(lost))
    assert sum(map(len, schedule)) > 200


def test_rollback_goes_back_to_the_last_multiple() -> None:
    schedule: list[list[int]] = [[] for _ in range(10)]
    schedule[7] = [2]
    assert rollback(schedule, 5) == (8, 1)
    assert rollback(schedule, 100) == (3, 1)


def test_a_loss_is_placed_on_the_undisturbed_curve() -> None:
    reference = [4.0, 3.0, 2.0, 1.0]  # smoothed: 3.5, 3, 2, 1.5
    assert equivalent(reference, 3.0) == 50
    assert equivalent(reference, 2.5) == 62.5
    assert equivalent(reference, 0.5) == 100
    assert equivalent(reference, 9.0) == 25


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_on(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.approximate.EVERY", 4)
    data = torch.arange(4000, dtype=torch.int64).remainder(251).to(torch.uint8)
    run = train(data, 0, method, 4, 0.3, 2)
    assert len(run.losses) == 1
    assert run.losses[0] < 5.7, "about ln 256 and not beyond: it trains on"
    assert run.failures > 0
