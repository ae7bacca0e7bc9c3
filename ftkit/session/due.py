"""DueMark: the pin by which a rank tells its agent which snapshot is to go to disk.

It is set from the start of the capture, so that the snapshot cannot be overwritten before the
agent has seen it. The newest wins: one that has waited until then is due no more. While one is
being written none is marked: the arena has one slab for it.
"""

from collections.abc import Callable

from ftkit.checkpoint.arena import Arena
from ftkit.checkpoint.ports import TraceHook
from ftkit.checkpoint.slabs import Pin, Sealed
from ftkit.core.ids import Step


class DueMark:
    """Of one rank. It moves in two strokes round the start of a capture: `pins`, or `undo`."""

    def __init__(self, due: Callable[[Step], bool], tell: TraceHook) -> None:
        """Mark the steps that are `due`. `tell` is told of those that are passed over."""
        self._due = due
        self._tell = tell
        self._moved: list[Sealed] = []

    def pins(self, arena: Arena, step: Step) -> list[Pin]:
        """The pins for the capture of `step`, which is about to start; older marks are taken off."""
        self._moved = []
        if not self._due(step):
            return []
        held = [(s, arena.pins(slab)) for slab, s in enumerate(arena.slabs()) if s is not None]
        for sealed, pins in held:
            if pins[Pin.PERSIST] and sealed.step != step:
                reason = f"step {sealed.step} is still being written"
                self._tell("checkpoint-skipped", step=step, reason=reason)
                return []
        self._moved = [sealed for sealed, pins in held if pins[Pin.DUE]]
        for sealed in self._moved:
            arena.pin(sealed, Pin.DUE, on=False)
        return [Pin.DUE]

    def undo(self, arena: Arena) -> None:
        """The capture did not start: what was due before is due still."""
        for sealed in self._moved:
            arena.pin(sealed, Pin.DUE)
        self._moved = []
