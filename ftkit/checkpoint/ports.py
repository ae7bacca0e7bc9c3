"""What the checkpoint room needs from outside, and the tiers that join it below the arena."""

from collections.abc import Iterable, Iterator
from typing import Protocol

from ftkit.checkpoint.layout import StateLayout
from ftkit.core.ids import Generation, Step


class TraceHook(Protocol):
    """Where events go: `core.trace.Trace.event` fits. Must not block or raise."""

    def __call__(self, kind: str, /, **fields: object) -> None:
        """Record one event with JSON-safe fields."""


class ParityTier(Protocol):
    """Redundancy between nodes: rebuilds the snapshot of a node that is gone."""

    def publish(self, step: Step, generation: Generation, blocks: Iterable[memoryview]) -> None:
        """Spread one sealed snapshot over the stripe. Blocks until enough peers hold it."""

    def rebuild(self, step: Step, generation: Generation) -> Iterator[memoryview]:
        """The bytes of a lost snapshot, in order. IntegrityError when too few parts are left."""


class PersistTier(Protocol):
    """Durable storage: turns a sealed snapshot into a checkpoint."""

    def persist(self, layout: StateLayout, step: Step, blocks: Iterable[memoryview]) -> None:
        """Write a checkpoint and return once it would survive a power cut."""

    def steps(self) -> list[Step]:
        """The steps with a complete checkpoint, ascending."""
