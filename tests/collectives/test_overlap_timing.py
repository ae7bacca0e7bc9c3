"""What overlap gains, and when it must not be tried: on a modelled network, to the microsecond."""

from typing import Any

import pytest
import torch

from ftkit.collectives.modelled import ModelledGroup, Network
from ftkit.collectives.overlap import linear
from ftkit.collectives.overlap.auto import AutoChunks
from ftkit.collectives.overlap.exchange import gather, scatter
from ftkit.collectives.overlap.flights import Flights
from ftkit.collectives.overlap.parts import graded
from ftkit.collectives.overlap.tuning import MANY, PLAIN, ChunkTuner, Cut, best, predicted

from .ranks import on, timed

ROWS, COLUMNS = 240, 100
#: Bytes that each of two ranks sends.
SENT = ROWS * COLUMNS * 4 // 2


def scattered(compute_s: float, cut: Cut, size: int = 2, rows: int = ROWS) -> Any:
    """A reduce-scatter whose rows take `compute_s` in all to make."""

    def rank(group: ModelledGroup) -> None:
        def produce(a: int, b: int) -> torch.Tensor:
            group.network.sleep(compute_s * (b - a) / rows)
            return torch.ones(b - a, COLUMNS)

        with Flights(group, "test") as flights:
            out = scatter(
                flights,
                produce,
                (rows, COLUMNS),
                chunks=cut.chunks,
                eager=cut.eager,
                like=torch.empty(0),
            )
        assert (out == size).all()

    return rank


@pytest.mark.parametrize("ratio", [0.5, 1.0, 2.0])
def test_chunks_hide_four_fifths_of_what_can_be_hidden(ratio: float) -> None:
    """Communication over computing from one half to two; latency is paid once."""
    compute_s, exchange_s = 0.060, 0.060 * ratio
    rate = SENT / exchange_s
    plain = timed(2, scattered(compute_s, PLAIN), rate=rate, latency_s=0.0002)
    assert plain == pytest.approx(compute_s + exchange_s + 0.0002, rel=1e-3)
    overlapped = timed(2, scattered(compute_s, Cut(8, eager=True)), rate=rate, latency_s=0.0002)
    hidden = (plain - overlapped) / min(compute_s, exchange_s)
    assert hidden >= 0.8
    assert overlapped == pytest.approx(predicted(8, 2, compute_s, exchange_s, 0.0), rel=0.06)


def test_the_own_shard_last_hides_something_even_in_one_chunk() -> None:
    compute_s, exchange_s = 0.060, 0.060
    eager = timed(2, scattered(compute_s, Cut(1, eager=True)), rate=SENT / exchange_s)
    assert eager == pytest.approx(0.090)


def test_four_ranks_start_on_four_receivers_at_once() -> None:
    """In staggered order no port is idle; in the order of ranks all would queue at rank 0's."""
    rows = 240
    sent = rows * COLUMNS * 4 * 3 // 4
    took = timed(4, scattered(0.0, Cut(4, eager=True), 4, rows), rate=sent / 0.1)
    assert took == pytest.approx(0.1, rel=0.01)


def test_a_gather_computes_on_what_is_there() -> None:
    def rank(group: ModelledGroup) -> None:
        def consume(a: int, b: int, rows: torch.Tensor) -> None:
            group.network.sleep(0.060 * (b - a) / ROWS)

        with Flights(group, "test") as flights:
            mine = torch.full((ROWS // 2, COLUMNS), float(group.rank()))
            whole = gather(flights, mine, ROWS, consume, chunks=8)
        assert whole[:, 0].tolist() == [0.0] * (ROWS // 2) + [1.0] * (ROWS // 2)

    # Own rows while the first chunk comes, then the rest as it comes; little comes last.
    assert timed(2, rank, rate=SENT / 0.060) == pytest.approx(0.0600 + 0.030 / 255, rel=0.01)


def test_the_weights_gradient_begins_while_others_rows_travel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of our own rows: of the input's and the weight's gradient only the last chunk comes after."""
    exchange_s, all_s = 0.060, 0.040
    network = Network(2, rate=SENT / exchange_s)
    plain = linear.times

    def times(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        network.sleep(all_s * a.shape[0] * a.shape[1] * b.shape[1] / (ROWS * COLUMNS * 4))
        return plain(a, b)

    x, weight = torch.ones(ROWS, 4, requires_grad=True), torch.ones(COLUMNS, 4, requires_grad=True)

    def rank(group: ModelledGroup) -> float:
        out = linear.linear_reduce_scatter(x, weight, group=group, chunks=4)
        network.wait(group.barrier())
        monkeypatch.setattr(linear, "times", times)
        began = network.now()
        _, of_weight = torch.autograd.grad(out, [x, weight], torch.ones_like(out))
        assert (of_weight == ROWS).all()
        return network.now() - began

    for took in on(network, rank):
        assert took == pytest.approx(exchange_s + all_s / 2 / 15, rel=0.01)


# -- chunks="auto" --------------------------------------------------------------------------


def trained(
    monkeypatch: pytest.MonkeyPatch, *, compute_s: float, exchange_s: float, each_s: float = 0.0
) -> tuple[ChunkTuner, list[float]]:
    """Calls of a linear with `chunks="auto"`; the tuner of rank 0, and how long each call took."""
    network = Network(2, rate=SENT / exchange_s)
    x, weight = torch.ones(ROWS, 4), torch.ones(COLUMNS, 4)
    plain = linear.times

    def times(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        network.sleep(compute_s * a.shape[0] / ROWS)
        return plain(a, b)

    monkeypatch.setattr(linear, "times", times)
    send = ModelledGroup.send

    def costly(self: ModelledGroup, *args: Any) -> Any:
        network.sleep(each_s)
        return send(self, *args)

    monkeypatch.setattr(ModelledGroup, "send", costly)

    def rank(group: ModelledGroup) -> tuple[ChunkTuner, list[float]]:
        auto, took = AutoChunks(network.now), []
        for _ in range(24):
            began = network.now()
            linear.linear_reduce_scatter(x, weight, group=group, chunks=auto)
            took.append(network.now() - began)
        (tuner,) = auto._tuners.values()
        return tuner, took

    (tuner, took), (other, _) = on(network, rank)
    assert tuner.cut == other.cut, "ranks must cut alike"
    assert tuner.settled
    return tuner, took


def test_auto_hides_what_it_can_where_communication_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    tuner, took = trained(monkeypatch, compute_s=0.060, exchange_s=0.060)
    assert tuner.cut.eager
    assert tuner.cut.chunks >= 4
    assert took[0] == pytest.approx(0.120, rel=0.01)
    assert took[-1] < 0.0625


def test_auto_takes_fewer_chunks_where_messages_are_dear(monkeypatch: pytest.MonkeyPatch) -> None:
    tuner, took = trained(monkeypatch, compute_s=0.060, exchange_s=0.060, each_s=0.004)
    assert tuner.cut.eager
    assert tuner.cut.chunks in (1, 2, 3)
    assert took[-1] < 0.085


def test_auto_does_not_overlap_where_that_would_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    tuner, took = trained(monkeypatch, compute_s=0.060, exchange_s=0.0005)
    assert tuner.cut == PLAIN
    assert took[-1] == pytest.approx(0.0605, rel=0.01)


def test_what_looks_good_and_is_not_is_dropped_after_a_try() -> None:
    tuner = ChunkTuner(2)
    while not (ask := tuner.note(1.0, 2.0 if tuner.cut.chunks == 1 else 2.07)):
        pass
    assert ask == [1.0, 1.0, pytest.approx(1.07)]
    tuner.agree(ask)
    k = best(2, 1.0, 1.0, 0.01)
    tried = []
    while not tuner.settled:
        tried.append(tuner.cut)
        if ask := tuner.note(0.0, 2.0 if tuner.cut == PLAIN else 1.99):
            tuner.agree(ask)
    assert tried[0] == PLAIN
    assert Cut(k, eager=True) in tried
    assert {tried.count(one) for one in tried} == {3}, "each as often, and in turns"
    assert tried[: len(tried) // 3] == tried[-len(tried) // 3 :]
    assert tuner.cut == PLAIN
    assert tuner.note(1.0, 5.0) == []


def test_what_turns_out_fastest_is_kept_whatever_the_model_says() -> None:
    tuner = ChunkTuner(2)
    while not (ask := tuner.note(1.0, 2.0 if tuner.cut.chunks == 1 else 2.07)):
        pass
    tuner.agree(ask)
    fewer = min(cut.chunks for cut in tuner._compared if cut.eager)
    assert fewer < best(2, 1.0, 1.0, 0.01)
    while not tuner.settled:
        if ask := tuner.note(0.0, 1.4 if tuner.cut == Cut(fewer, eager=True) else 1.6):
            tuner.agree(ask)
    assert tuner.cut == Cut(fewer, eager=True)


@pytest.mark.parametrize("size", [2, 3, 4, 8])
@pytest.mark.parametrize("ratio", [1.0, 2.0])
def test_a_link_as_slow_as_computing_is_never_idle_after_the_first_chunk(
    size: int, ratio: float
) -> None:
    """Whatever the number of ranks: sending one chunk takes at least as long as making the next."""
    rows, compute_s, chunks = 240 * size, 0.060, 4
    sent = rows * COLUMNS * 4 * (size - 1) // size
    exchange_s = compute_s * ratio
    took = timed(
        size,
        scattered(compute_s, Cut(chunks, eager=True), size, rows),
        rate=sent / exchange_s,
    )
    first = compute_s / size * graded(1.0, size, chunks)[0]
    assert took == pytest.approx(exchange_s + first, rel=0.01)


def test_the_slowest_rank_decides_for_all() -> None:
    fast, slow = ChunkTuner(2), ChunkTuner(2)
    asks: list[list[float]] = []
    for tuner, exchange_s in ((fast, 0.001), (slow, 1.0)):
        while not (
            ask := tuner.note(1.0, 1.0 + exchange_s * (1 if tuner.cut.chunks < MANY else 1.1))
        ):
            pass
        asks.append(ask)
    agreed = [max(pair) for pair in zip(*asks, strict=True)]
    for tuner in (fast, slow):
        tuner.agree(agreed)
        while not tuner.settled:
            if ask := tuner.note(0.0, 2.0 - tuner.cut.eager):
                tuner.agree(ask)
    assert fast.cut == slow.cut
    assert fast.cut.eager
