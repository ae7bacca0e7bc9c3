"""A governed send beside a training step, on a modelled network: what it costs, what it uses."""

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ftkit.collectives.modelled import ModelledGroup, Network
from ftkit.collectives.overlap import traffic
from ftkit.collectives.overlap.traffic import TrafficGovernor
from ftkit.core.errors import GenerationAborted

from .ranks import on

MB = 1 << 20
RATE = 125 * MB
#: A step: forward, and then six buckets that are reduced while backward goes on.
FORWARD_S, LAYER_S, BUCKETS, BUCKET = 0.072, 0.024, 6, 2 * MB
SNAPSHOT = 48 * MB
LIMITS = replace(traffic.LIMITS, max_slowdown=0.0, piece_bytes_min=64 << 10, rate_guess=RATE)


def step(group: ModelledGroup, governor: TrafficGovernor) -> None:
    """Each bucket is reduced while the next layer's backward runs, and must be done by its end."""
    network = group.network
    network.sleep(FORWARD_S + LAYER_S)
    for _ in range(BUCKETS):
        began = network.now()
        with governor.busy():
            work = group.allreduce([torch.zeros(BUCKET // 4)])
            network.sleep(BUCKET / RATE)
            work.wait()
        network.sleep(max(0.0, began + LAYER_S - network.now()))


def trained(steps: int, mode: str, buffer_bytes: int = 0) -> tuple[float, float, list[float]]:
    """Seconds of all steps, of the snapshot's way, and the windows that were seen."""
    network = Network(2, rate=RATE, latency_s=0.0001, buffer_bytes=buffer_bytes)

    def rank(group: ModelledGroup) -> tuple[float, float, list[float]]:
        peer, took = 1 - group.rank(), [0.0]
        governor = TrafficGovernor(group, limits=LIMITS, clock=network.now, rest=network.sleep)
        snapshot = torch.full((SNAPSHOT,), group.rank(), dtype=torch.uint8)
        copy = torch.empty_like(snapshot)

        def aside(act: Any) -> threading.Thread:
            def body() -> None:
                act()
                took[0] = network.now() - began
                network.leave()

            network.enter()
            thread = threading.Thread(target=body)
            thread.start()
            return thread

        threads = []
        for number in range(steps):
            if number == 2:  # the first steps are learnt from
                group.barrier().wait()
                began = network.now()
                if mode == "governed":
                    threads = [
                        aside(lambda: governor.recv(copy, peer)),
                        aside(lambda: governor.send(snapshot, peer)),
                    ]
                elif mode == "blast":
                    came = group.recv([copy], peer, 5)
                    group.send([snapshot], peer, 5)
            step(group, governor)
        total_s = network.now() - began
        if mode == "blast":
            came.wait()
        network.leave()
        for thread in threads:
            thread.join()
        network.enter()
        if mode != "none":
            assert (copy == peer).all()
        return total_s, took[0], governor.windows

    results = on(network, rank)
    return max(r[0] for r in results), max(r[1] for r in results), results[0][2]


def test_a_governed_snapshot_costs_little_and_uses_the_windows() -> None:
    steps = 10
    alone, _, _ = trained(steps, "none")
    blast, _, _ = trained(steps, "blast")
    governed, took, _ = trained(steps, "governed")
    assert governed <= 1.015 * alone
    assert blast > 1.01 * alone
    # Of the time on its way that training left the network alone, so much carried its bytes.
    idle_share = 1 - BUCKETS * (BUCKET / RATE) / (alone / (steps - 2))
    assert 0.7 * idle_share * took <= SNAPSHOT / RATE


def test_buffers_that_swallow_a_piece_do_not_blind_it() -> None:
    alone, _, _ = trained(10, "none", buffer_bytes=4 * MB)
    governed, _, _ = trained(10, "governed", buffer_bytes=4 * MB)
    assert governed <= 1.015 * alone


def test_a_forecast_says_whether_it_fits() -> None:
    network = Network(2, rate=RATE)

    def rank(group: ModelledGroup) -> None:
        governor = TrafficGovernor(group, limits=LIMITS, clock=network.now, rest=network.sleep)
        for _ in range(4):
            step(group, governor)
        assert governor.forecast(4 * MB, within_s=1.0).fits
        assert not governor.forecast(1 << 30, within_s=1.0).fits

    on(network, rank)


def test_a_fault_ends_both_sides() -> None:
    network = Network(2, rate=1e6)

    def rank(group: ModelledGroup) -> str:
        governor = TrafficGovernor(group, limits=LIMITS, clock=network.now, rest=network.sleep)
        data = torch.zeros(4 * MB, dtype=torch.uint8)
        if group.rank() == 0:
            network.sleep(0.1)
            group.abort()
            return "aborted"
        with pytest.raises(GenerationAborted):
            governor.send(data, 0)
        assert not governor._governor._flying, "nothing holds the next one back"
        return "ended"

    assert on(network, rank) == ["aborted", "ended"]


class Reduced:
    """A model of which a governor sees the buckets, in a group of four."""

    class process_group:  # noqa: N801 - an attribute of models
        @staticmethod
        def size() -> int:
            return 4

    def register_comm_hook(self, state: object, hook: Any) -> None:
        self.hook = hook


class Bucket:
    def __init__(self, grads: torch.Tensor) -> None:
        self._grads = grads

    def buffer(self) -> torch.Tensor:
        return self._grads


@pytest.mark.parametrize("fails", [True, False])
def test_a_bucket_is_divided_before_it_is_summed_and_busy_ends(
    fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, model = Network(1, rate=RATE), Reduced()
    governor = TrafficGovernor(network.group(0), clock=network.now, rest=network.sleep)

    def all_reduce(grads: torch.Tensor, **_: Any) -> Any:
        if fails:
            raise RuntimeError("no peer")
        grads *= 4  # all ranks have the same
        future = torch.futures.Future[Any]()
        future.set_result([grads])
        return type("Work", (), {"get_future": lambda self: future})()

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    governor.attach(model)
    grads = torch.full((3,), 60_000.0, dtype=torch.float16)
    if fails:
        with pytest.raises(RuntimeError, match="no peer"):
            model.hook(None, Bucket(grads))
    else:
        assert (model.hook(None, Bucket(grads)).wait() == 60_000).all(), "four of them are too many"
    assert not governor._windows.busy
