"""What `overlap` measures on a modelled link, where all takes its time to the microsecond."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch

from benchmarks.figures import Figure
from ftkit.collectives.modelled import Network
from ftkit.collectives.overlap.exchange import scatter
from ftkit.collectives.overlap.flights import Flights
from ftkit.collectives.overlap.tuning import PLAIN, Cut, best


def on_a_model() -> Figure:
    """A scatter on a modelled link, where computing and sending take their time to the microsecond."""
    rows, columns, compute_s = 240, 100, 0.060
    worst, told = 1.0, list[str]()
    for ratio in (0.5, 1.0, 2.0):
        chunks = best(2, compute_s, compute_s * ratio, 0.0)
        took = {}
        for cut in (PLAIN, Cut(chunks, eager=True)):
            network = Network(2, rate=rows * columns * 2 / (compute_s * ratio), latency_s=0.0002)
            network.enter(2)
            with ThreadPoolExecutor(2) as threads:
                act = partial(scattered, network, cut, rows, columns, compute_s)
                list(threads.map(act, range(2)))
            took[cut.eager] = network.now()
        hidden = (took[False] - took[True]) / (compute_s * min(1.0, ratio))
        worst = min(worst, hidden)
        told.append(f"{100 * hidden:.1f} % at {ratio:g}")
    return Figure(
        name="scatter on a modelled link: communication hidden, sending over computing 0.5 to 2",
        value=100 * worst,
        unit="%",
        at_least=80,
        against=", ".join(told),
    )


def scattered(
    network: Network, cut: Cut, rows: int, columns: int, compute_s: float, rank: int
) -> None:
    """One rank of it."""

    def produce(a: int, b: int) -> torch.Tensor:
        network.sleep(compute_s * (b - a) / rows)
        return torch.ones(b - a, columns)

    try:
        with Flights(network.group(rank), "modelled") as flights:
            scatter(
                flights, produce, (rows, columns),
                chunks=cut.chunks, eager=cut.eager, like=torch.empty(0),
            )  # fmt: skip
    finally:
        network.leave()
