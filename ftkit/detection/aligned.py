"""Aligned: brings together what the members say of the same step, whatever order it comes in.

A step is handed on when everybody who is expected has spoken, or when some are two steps further:
who has not spoken then was not there, or its record was overwritten before it was read. Each step
is handed on once, and in order.
"""

from collections.abc import Mapping
from typing import Final

from ftkit.core.ids import Generation, MemberId, Step
from ftkit.core.world import World
from ftkit.detection.signals import StepSeen

#: So many steps later nobody is waited for.
_PATIENCE: Final = 2

StepOf = Mapping[MemberId, StepSeen]


class Aligned:
    """Collects `StepSeen`s; `take` hands on whole steps."""

    def __init__(self) -> None:
        self._world: World | None = None
        self._members: frozenset[MemberId] = frozenset()
        self._open: dict[tuple[Generation, Step], dict[MemberId, StepSeen]] = {}
        self._done: tuple[Generation, Step] = (Generation(0), Step(-1))
        self._silent: set[MemberId] = set()
        """Members that were missing last time: nobody waits for them."""

    def change(self, world: World) -> None:
        """A generation begins. Its steps may be numbered below those of the last one."""
        self._world = world
        self._members = frozenset(m.member for m in world.members)
        self._silent.clear()

    def add(self, seen: StepSeen) -> None:
        """Take in one. What comes too late, or from no member of the world, is dropped."""
        key = (seen.generation, seen.step)
        if key <= self._done or (self._world is not None and seen.member not in self._members):
            return
        self._silent.discard(seen.member)
        self._open.setdefault(key, {})[seen.member] = seen

    def take(self, *, rest: bool = False) -> list[StepOf]:
        """The steps that are ready, oldest first; with `rest`, all that are there."""
        ready: list[StepOf] = []
        for key in sorted(self._open):
            found = self._open[key]
            awaited = self._members - self._silent - found.keys() if self._world else ()
            later = sum(1 for other in self._open if other > key)
            if not (rest or later >= _PATIENCE or (self._world is not None and not awaited)):
                break
            self._silent |= set(awaited)
            self._done = key
            ready.append(self._open.pop(key))
        return ready
