"""Stalls: steps that waited for a loader or for the garbage collector. Labels, no accusations.

A stall is a step in which one member spent far more time on such a thing than it used to, enough
of it for the others to notice. That it happens is told; that it goes on for ever is told as well,
and still nobody is evicted for it.
"""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from ftkit.core.ids import MemberId
from ftkit.core.verdict import Fault
from ftkit.detection.cusum import median
from ftkit.detection.signals import StepSeen

#: A stall takes this many times what the member used to take for it,
_FACTOR: Final = 5.0
#: and this share of a usual step: below, nobody would notice,
_SHARE: Final = 0.5
#: and at least this long: a busy host keeps anybody waiting for some tens of milliseconds.
_LEAST_S: Final = 0.1

#: Steps that make what is usual.
_WINDOW: Final = 64

#: For so many steps after the last stall of a kind it still stands as a verdict.
_HOLDS_STEPS: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Stalled:
    """One member stalls, or did a few steps ago."""

    fault: Fault
    member: MemberId
    since: float
    """The first of a row of stalls."""
    seconds: float
    """What the last of them took."""
    usual_s: float
    step: int
    """The last of them."""
    times: int


@dataclass(slots=True)
class _Kept:
    usual: deque[float]
    since: float = 0.0
    seconds: float = 0.0
    usual_s: float = 0.0
    step: int = 0
    times: int = 0
    quiet: int = _HOLDS_STEPS


class Stalls:
    """Watches the loader and the collector of every member."""

    def __init__(self) -> None:
        self._kept: dict[tuple[MemberId, Fault], _Kept] = {}

    def step(self, seen: Iterable[StepSeen], *, step_s: float) -> list[Stalled]:
        """Take in one step; `step_s` is what a step usually takes. Says which stalls hold."""
        found: list[Stalled] = []
        for one in seen:
            for fault, spent in spent_on(one).items():
                kept = self._kept.setdefault(
                    (one.member, fault), _Kept(usual=deque(maxlen=_WINDOW))
                )
                usual = median(kept.usual) if kept.usual else 0.0
                kept.usual.append(spent)
                if spent >= max(_FACTOR * usual, _SHARE * step_s, _LEAST_S):
                    if kept.quiet >= _HOLDS_STEPS:
                        kept.since, kept.times = one.at - spent, 0
                    kept.quiet, kept.times = 0, kept.times + 1
                    kept.seconds, kept.usual_s, kept.step = spent, usual, int(one.step)
                else:
                    kept.quiet += 1
                if kept.quiet < _HOLDS_STEPS:
                    found.append(
                        Stalled(
                            fault=fault,
                            member=one.member,
                            since=kept.since,
                            seconds=kept.seconds,
                            usual_s=kept.usual_s,
                            step=kept.step,
                            times=kept.times,
                        )
                    )
        return found

    def forget(self, keep: frozenset[MemberId]) -> None:
        """Drop all but these members."""
        self._kept = {key: kept for key, kept in self._kept.items() if key[0] in keep}


def spent_on(seen: StepSeen) -> Mapping[Fault, float]:
    """What the step spent on its loader and on collections."""
    return {Fault.DATA_STALL: seen.seconds.get("data", 0.0), Fault.GC_STALL: seen.gc_s}
