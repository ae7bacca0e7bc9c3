"""Fuse: burns with every byte this process moves, and goes off at the one it was cut for.

For drills: a process that kills itself at a byte of an all-reduce dies inside a frame, a header
or a memory read, where no timer would hit it. Unlit, which is always but in a drill, it costs
one look at a flag for each frame. Owned by the communication thread.
"""

from collections.abc import Callable

from ftkit.collectives.arithmetic import Bytes


class Fuse:
    """See the module."""

    __slots__ = ("_left", "_strike", "lit")

    def __init__(self) -> None:
        self.lit = False
        self._left = 0
        self._strike: Callable[[], None] = _nothing

    def light(self, nbytes: int, strike: Callable[[], None]) -> None:
        """Call `strike` once `nbytes` (1 or more) have been moved from now on."""
        self._left, self._strike = max(nbytes, 1), strike
        self.lit = True

    def short(self, parts: list[memoryview]) -> list[memoryview]:
        """The first bytes of `parts`, no more of them than are left to burn."""
        left, kept = self._left, list[memoryview]()
        for part in parts:
            kept.append(part[:left])
            left -= len(kept[-1])
            if not left:
                break
        return kept

    def first(self, into: Bytes) -> Bytes:
        """The same of one piece of memory."""
        return into[: self._left]

    def burn(self, nbytes: int) -> None:
        """So many bytes were moved."""
        self._left -= nbytes
        if self._left <= 0:
            self.lit = False
            self._strike()


def _nothing() -> None:
    """There is nothing to strike."""
