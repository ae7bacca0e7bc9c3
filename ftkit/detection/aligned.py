"""Aligned: brings together what the members say of the same step, whatever order it comes in.

A step is handed on when everybody has spoken of it or of a later one: a member's records come in
order, so what is missing then was lost. Nor is anybody waited for who has said nothing while the
others have gone on for some steps and some seconds. Each step is handed on once, and in order.
"""

from collections.abc import Mapping
from typing import Final

from ftkit.core.ids import Generation, MemberId, Step
from ftkit.core.world import World
from ftkit.detection.signals import StepSeen

#: So many steps and seconds further, nobody is waited for: longer where an agent reports seldom.
_STEPS_AHEAD: Final = 2
_SECONDS_AHEAD: Final = 10.0
#: Nor is anybody when so many steps wait, whatever the time.
_OPEN_MAX: Final = 1024

StepOf = Mapping[MemberId, StepSeen]
_Key = tuple[Generation, Step]


class Aligned:
    """Collects `StepSeen`s; `take` hands on whole steps."""

    def __init__(self, report_s: float = 0.5) -> None:
        """Expect each agent to tell every `report_s`."""
        self._ahead_s = max(_SECONDS_AHEAD, 2 * report_s)
        self._world: World | None = None
        #: Each member of the world -> the last step it has spoken of.
        self._latest: dict[MemberId, _Key] = {}
        self._silent: set[MemberId] = set()
        self._members: list[MemberId] = []
        self._looking_at: _Key | None = None
        self._looked_at = 0
        self._open: dict[_Key, dict[MemberId, StepSeen]] = {}
        self._at: dict[_Key, float] = {}
        self._done: _Key = (Generation(0), Step(-1))
        self._newest_at = 0.0

    def change(self, world: World) -> None:
        """A generation begins. Its steps may be numbered below those of the last one."""
        self._world = world
        nothing = (Generation(0), Step(-1))
        self._latest = {m.member: nothing for m in world.members}
        self._members = list(self._latest)
        self._looking_at = None
        self._silent.clear()

    def add(self, seen: StepSeen) -> None:
        """Take in one. What comes too late, or from no member of the world, is dropped."""
        key = (seen.generation, seen.step)
        if self._world is not None and seen.member not in self._latest:
            return
        if seen.member not in self._latest:
            self._members.append(seen.member)
        self._latest[seen.member] = max(key, self._latest.get(seen.member, key))
        self._silent.discard(seen.member)
        if key > self._done:
            self._open.setdefault(key, {})[seen.member] = seen
            self._at[key] = max(seen.at, self._at.get(key, seen.at))
            self._newest_at = max(self._newest_at, seen.at)

    def take(self, *, rest: bool = False) -> list[StepOf]:
        """The steps that are ready, oldest first; with `rest`, all that are there."""
        ready: list[StepOf] = []
        while self._open:
            key = min(self._open)
            if not (rest or self._is_ready(key)):
                break
            self._done = key
            del self._at[key]
            ready.append(self._open.pop(key))
        return ready

    def _is_ready(self, key: _Key) -> bool:
        """Costs one pass over the members for each step, however often it is asked."""
        if self._looking_at != key:
            self._looking_at, self._looked_at = key, 0
        members = self._members
        # Nobody falls back behind a step: who was passed once needs no second look.
        while self._looked_at < len(members):
            member = members[self._looked_at]
            if self._latest[member] < key and member not in self._silent:
                break
            self._looked_at += 1
        else:
            return True
        ahead = self._newest_at - self._at[key] > self._ahead_s
        if (ahead and len(self._open) > _STEPS_AHEAD) or len(self._open) > _OPEN_MAX:
            self._silent |= {m for m in members if self._latest[m] < key}
            return True
        return False
