"""Ranks as threads of one process, over a modelled network or over real groups."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ftkit.collectives.modelled import ModelledGroup, Network

FAST = 1e12


def play(groups: list[Any], rank: Callable[[Any], Any]) -> list[Any]:
    """`rank(group)` on a thread for each group; what they return. The first error is raised."""
    with ThreadPoolExecutor(len(groups)) as threads:
        running = [threads.submit(rank, group) for group in groups]
        return [one.result(timeout=60) for one in running]


def on(network: Network, rank: Callable[[ModelledGroup], Any]) -> list[Any]:
    """`play` on all ranks of a modelled network."""

    def body(group: ModelledGroup) -> Any:
        try:
            return rank(group)
        finally:
            network.leave()

    network.enter(network.size)
    return play([network.group(r) for r in range(network.size)], body)


def everywhere(
    size: int, rank: Callable[[ModelledGroup], Any], *, rate: float = FAST, **more: Any
) -> list[Any]:
    """`on` a new network."""
    return on(Network(size, rate=rate, **more), rank)


def timed(size: int, rank: Callable[[ModelledGroup], Any], *, rate: float, **more: Any) -> float:
    """Modelled seconds until the last rank was done."""
    network = Network(size, rate=rate, **more)
    on(network, rank)
    return network.now()
