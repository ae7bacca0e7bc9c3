"""The benchmark of approximate recovery: its arithmetic, and that its stages train."""

import itertools
import json
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.approximate import METHODS, Run, equivalent, failures_of, main, rollback, train


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


def test_what_was_trained_is_kept_and_not_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained: list[tuple[int, str]] = []

    def train_all(
        text: bytes, wanted: list[tuple[int, str]], options: Namespace
    ) -> Iterator[tuple[tuple[int, str], Run]]:
        trained.extend(wanted)
        for seed, method in wanted:
            yield (seed, method), Run([5.0, 4.0, 3.0 + seed], len(method))

    monkeypatch.setattr("benchmarks.approximate._train_all", train_all)
    state, text = tmp_path / "state.jsonl", tmp_path / "text"
    text.write_bytes(bytes(range(256)) * 40)
    options = ["--data", str(text), "--state", str(state), "--json", "--iterations"]
    for seeds, iterations, new in (
        (1, "75", {0}),
        (2, "75", {1}),
        (2, "75", set()),
        (1, "50", {0}),
    ):
        main([*options, iterations, "--seeds", str(seeds)])
        assert json.loads(capsys.readouterr().out)["problems"] == []
        assert {seed for seed, _ in trained} == new
        assert len(trained) == len(new) * (2 + len(METHODS))
        trained.clear()
