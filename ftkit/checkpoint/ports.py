"""What the checkpoint room needs from outside, and the tiers that join it below the arena."""

from collections.abc import Iterable
from typing import Protocol

from ftkit.checkpoint.box import Box, TensorBox


class TraceHook(Protocol):
    """Where events go: `core.trace.Trace.event` fits. Must not block or raise."""

    def __call__(self, kind: str, /, **fields: object) -> None:
        """Record one event with JSON-safe fields."""


class BoxSource(Protocol):
    """Saved tensors of one step that can be read box by box. `str()` of it names it to people."""

    @property
    def threads(self) -> int:
        """How many may read at once, and are of use: 1 where it is one thread's."""

    def entries(self) -> Iterable[TensorBox]:
        """The boxes it holds, empty ones too: they say that a tensor exists."""

    def read(self, name: str, box: Box, out: memoryview, /) -> None:
        """Read part of one tensor. Blocks; used from `threads` threads.

        Args:
          name: of the tensor.
          box: the elements wanted, inside one of `entries`, counted in the whole tensor.
          out: writable bytes (format "B"), exactly the box in C order. The caller's.

        Raises:
          IntegrityError: some of the bytes are not what was written; `out` holds anything.
          WireError: the source is gone.
          OSError: the source is gone.
        """
