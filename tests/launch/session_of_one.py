"""A session of one rank without faults: what a training script needs of ftkit, and no more."""

import random
from collections.abc import Iterator
from typing import Any, Self

import torch
from torch.utils.data import default_collate


class SessionOfOne:
    """Plays every slot of every step itself and remembers what it was told."""

    rank, world_size, seat, generation = 0, 1, 0, 1

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, object]]] = []
        self.trace = self
        self.protected: dict[str, object] = {}

    def event(self, kind: str, **fields: object) -> None:
        self.events.append((kind, fields))

    def protect(self, **state: object) -> None:
        self.protected = state

    def steps(
        self,
        dataset: Any,
        *,
        slots: int,
        slot_size: int,
        until: int,
        seed: int = 0,
        **_of_several: object,
    ) -> Iterator["StepOfOne"]:
        for index in range(1, until + 1):
            order = random.Random(f"{seed} {index}")
            chosen = [
                [order.randrange(len(dataset)) for _ in range(slot_size)] for _ in range(slots)
            ]
            yield StepOfOne(index, dataset, chosen)


class StepOfOne:
    """One step; it commits unless its body raises."""

    def __init__(self, index: int, dataset: Any, chosen: list[list[int]]) -> None:
        self.index, self.committed = index, False
        self._losses: list[float] = []
        self._dataset, self._chosen = dataset, chosen

    @property
    def loss(self) -> float:
        return sum(self._losses) / len(self._losses)

    def batches(self) -> Iterator[Any]:
        for slot in self._chosen:
            yield default_collate([self._dataset[i] for i in slot])

    def record(self, loss: torch.Tensor) -> None:
        self._losses.append(loss.item())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.committed = error[0] is None
