"""Halts: members that the kernel does not schedule while they enter, repair or leave a world.

What a member's row says is judged in the world it belongs to. One that was stopped before it came
there, or as it repairs it, shows a row of the world before, or one that no rule speaks of, and
everybody waits for it. That it is stopped needs no row: the kernel says so. It is named; whom to
remove is for the recovery to say, which has deadlines of its own.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ftkit.core.ids import MemberId, Seat
from ftkit.core.verdict import Fault, Verdict
from ftkit.core.world import World
from ftkit.detection.observations import RowSeen
from ftkit.detection.track import EXEMPT, Track, is_stopped


@dataclass(frozen=True, slots=True)
class _Halt:
    since: float
    last: float
    pid: int


class Halts:
    """Who is stopped, and since when. Owned by the detector's thread."""

    def __init__(self) -> None:
        self._halts: dict[MemberId, _Halt] = {}

    def see(self, seen: RowSeen) -> None:
        """Take in a look at a process, whichever world its row is of."""
        if not is_stopped(seen.facts):
            self._halts.pop(seen.member, None)
        elif (before := self._halts.get(seen.member)) is None:
            self._halts[seen.member] = _Halt(seen.at, seen.at, seen.row.pid)
        elif seen.at > before.last:
            self._halts[seen.member] = _Halt(before.since, seen.at, before.pid)

    def keep(self, world: World) -> None:
        """Forget whoever is not of this world."""
        members = {m.member for m in world.members}
        self._halts = {m: halt for m, halt in self._halts.items() if m in members}

    def suspicions(
        self,
        now: float,
        world: World,
        tracks: Mapping[MemberId, Track],
        *,
        limit_s: float,
        recent_s: float,
        stretch_s: Callable[[float], float],
        confidence: float,
    ) -> dict[MemberId, Verdict]:
        """Members that are stopped outside of any step of `world`.

        Args:
          now: seconds on the detector's clock.
          world: the world that they are of.
          tracks: of those with a row of this world.
          limit_s: stopped for no longer, nobody is named.
          recent_s: a look that is older says nothing.
          stretch_s: by how much the observer was late since then.
          confidence: of the verdicts.
        """
        verdicts: dict[MemberId, Verdict] = {}
        for member in world.members:
            halt = self._halts.get(member.member)
            track = tracks.get(member.member)
            if halt is None or (track is not None and track.row.phase not in EXEMPT):
                continue
            if now - halt.last > recent_s:
                continue
            lasted_s = halt.last - halt.since
            if lasted_s > limit_s + stretch_s(halt.since):
                verdicts[member.member] = Verdict(
                    fault=Fault.STOPPED,
                    member=member.member,
                    seat=member.seat,
                    reason=_reason(member.member, member.seat, halt, world),
                    since_s=halt.since,
                    suspected=True,
                    confidence=confidence,
                    evidence={"stopped_s": round(lasted_s, 3), "pid": halt.pid},
                )
        return verdicts


def _reason(member: MemberId, seat: Seat, halt: _Halt, world: World) -> str:
    return (
        f"seat {seat} (member {member}, pid {halt.pid}) is stopped for "
        f"{halt.last - halt.since:.1f} s outside of any step, in or before generation "
        f"{world.generation}, and the job waits for it; suspected: `kill -CONT` lets it go on"
    )
