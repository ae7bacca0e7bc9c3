"""What the checkpoint room needs from outside, and the tiers that join it below the arena."""

from collections.abc import Iterable
from typing import Protocol

from ftkit.checkpoint.box import Box, TensorBox
from ftkit.checkpoint.layout import StateLayout
from ftkit.core.ids import Step


class TraceHook(Protocol):
    """Where events go: `core.trace.Trace.event` fits. Must not block or raise."""

    def __call__(self, kind: str, /, **fields: object) -> None:
        """Record one event with JSON-safe fields."""


class PersistTier(Protocol):
    """Durable storage: turns a sealed snapshot into a checkpoint."""

    def persist(self, layout: StateLayout, step: Step, blocks: Iterable[memoryview]) -> None:
        """Write a checkpoint and return once it would survive a power cut."""

    def steps(self) -> list[Step]:
        """The steps with a complete checkpoint, ascending."""


class BoxSource(Protocol):
    """Saved tensors of one step that can be read box by box. `str()` of it names it to people."""

    def entries(self) -> Iterable[TensorBox]:
        """The boxes it holds, empty ones too: they say that a tensor exists."""

    def read(self, name: str, box: Box, out: memoryview, /) -> None:
        """Read part of one tensor. Blocks; used from one thread.

        Args:
          name: of the tensor.
          box: the elements wanted, inside one of `entries`, counted in the whole tensor.
          out: writable bytes (format "B"), exactly the box in C order. The caller's.

        Raises:
          IntegrityError: some of the bytes are not what was written; `out` holds anything.
          WireError: the source is gone.
          OSError: the source is gone.
        """
