"""Goodput: the share of a run's time that went into steps that stayed, and where the rest went.

Pure, over the event stream. The clock runs through the events once, and every second is given to
one cause, so that the causes and the committed time add up to the wall time. ::

    spawn ... resume | step | step | ... fault | halt | resume ... first commit | step ... end
        idle            committed      recompute detect regroup  transfer, rest   committed  idle

A step at a smaller world counts as committed for what it takes at the full one; the rest is
`degraded`. Times of hosts whose clocks are not shared cannot be compared: see `core.trace`.
"""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from ftkit.core.trace import MALFORMED
from ftkit.detection.incident import incidents

Event = Mapping[str, Any]


class Cause(StrEnum):
    """What a second was lost to."""

    DETECT = "detect"
    """From a fault until the world was told to stop."""
    REGROUP = "regroup"
    """Until a world trained again: agreement, processes, entering it, letting newcomers in."""
    TRANSFER = "transfer"
    """State was loaded while everybody waited for it."""
    RECOMPUTE = "recompute"
    """Work that was thrown away: the attempt in flight, and steps that were undone."""
    DEGRADED = "degraded"
    """A smaller world took longer over a step."""
    SNAPSHOT = "snapshot"
    """Training was held up by snapshots."""
    IDLE = "idle"
    """No world trained: start, and after the last step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Goodput:
    """A run's time, divided without remainder. Seconds."""

    wall_s: float
    committed_s: float
    """In steps that stayed committed, at the full world's pace."""
    lost_s: Mapping[Cause, float]
    """The rest, by cause."""
    steps: int
    """Steps that stayed committed."""
    undone: int
    """Steps that were committed once, and lost."""

    @property
    def share(self) -> float | None:
        """Committed time / wall time; None for a run without time."""
        return self.committed_s / self.wall_s if self.wall_s > 0 else None

    @property
    def training_share(self) -> float | None:
        """The same without idle time: of a short run, what is not its start and its end."""
        trained_s = self.wall_s - self.lost_s[Cause.IDLE]
        return self.committed_s / trained_s if trained_s > 0 else None

    def paragraph(self) -> str:
        """For people, in a sentence or two; empty for a run without a step."""
        if not self.steps or self.share is None or self.training_share is None:
            return ""
        lost = sorted(self.lost_s.items(), key=lambda item: -item[1])
        told = ", ".join(f"{cause} {s:.2f} s" for cause, s in lost if s >= 0.005)
        text = (
            f"Goodput was {self.share:.1%}: {self.committed_s:.2f} s of {self.wall_s:.2f} s went "
            f"into {self.steps} steps that stayed"
        )
        text += f"; {self.training_share:.1%} without start and end" if told else ""
        text += f". Lost were: {told}." if told else "."
        return text + (f" {self.undone} committed steps were undone." if self.undone else "")

    def to_json(self) -> dict[str, object]:
        return {
            "goodput": self.share,
            "goodput_training": self.training_share,
            "wall_s": round(self.wall_s, 6),
            "committed_s": round(self.committed_s, 6),
            "lost_s": {cause.value: round(s, 6) for cause, s in self.lost_s.items()},
            "steps": self.steps,
            "undone": self.undone,
        }


def goodput(events: Iterable[Event]) -> Goodput:
    """Divide a run's time; pure. Events in any order, those without a time are passed over."""
    timed = sorted((e for e in events if _number(e.get("mono"))), key=lambda e: float(e["mono"]))
    faults = [i.began for i in incidents(timed) if i.began is not None]
    first = _walk(timed, faults, {})
    paces = {world: statistics.median(spans) for world, spans in first.clean.items()}
    walked = _walk(timed, faults, paces)
    lost = {cause: walked.lost[cause] for cause in Cause}
    return Goodput(
        wall_s=walked.at - walked.began,
        committed_s=sum(walked.steps.values()),
        lost_s=lost,
        steps=len(walked.steps),
        undone=walked.undone,
    )


def step_paces(events: Iterable[Event]) -> dict[int, float]:
    """The median step by world size, of steps that nothing disturbed; pure."""
    timed = sorted((e for e in events if _number(e.get("mono"))), key=lambda e: float(e["mono"]))
    return {w: statistics.median(s) for w, s in _walk(timed, [], {}).clean.items()}


def _walk(events: list[Event], faults: list[float], paces: Mapping[int, float]) -> "_Clock":
    clock = _Clock(float(events[0]["mono"]) if events else 0.0, faults, paces)
    for event in events:
        try:
            clock.take(event)
        except MALFORMED:
            continue  # it says less than its kind must; the checker lists those
    clock.close()
    return clock


class _Clock:
    """Runs through the events and gives each second away once. `at`: given away until here."""

    def __init__(self, began: float, faults: list[float], paces: Mapping[int, float]) -> None:
        self.began = self.at = self.now = began
        self.lost: dict[Cause, float] = defaultdict(float)
        self.steps: dict[int, float] = {}
        self.undone = 0
        self.clean: dict[int, list[float]] = defaultdict(list)
        """Undisturbed steps' times by world size."""
        self._faults = sorted(faults)
        self._paces = paces
        self._world = self._full = 0
        self._training = False
        self._first = True
        """No world has trained before this one."""
        self._entering = True
        """No step was committed in this world yet, or it has just grown."""
        self._members: frozenset[int] = frozenset()
        self._blocked: dict[int, float] = {}
        self._restored = 0.0
        self._ended = False

    def take(self, event: Event) -> None:
        if self._ended:
            return
        self.now = float(event["mono"])
        match event["kind"]:
            case "resume":
                self._resume(int(event["step"]), frozenset(int(m) for m in event["members"]))
            case "halt" | "report" | "rollback" if self._training:
                self._halt()
            case "commit" | "forward":
                self._commit(int(event["step"]))
            case "snapshot":
                seat = int(event["seat"])
                held = float(event["begin_s"]) + float(event["gate_s"])
                self._blocked[seat] = self._blocked.get(seat, 0.0) + held
            case "restore" if int(event["seat"]) in self._members and self._entering:
                self._restored = max(self._restored, float(event["seconds"]))
            case "decision" if event["action"] == "grown":
                self._enter(frozenset(int(m) for m in event["members"]))
            case "end":
                self._ended = True

    def close(self) -> None:
        """Whatever follows the last step was not training."""
        self._give(Cause.REGROUP if self._world and not self._training else Cause.IDLE)

    def _give(self, cause: Cause, until: float | None = None) -> None:
        until = self.now if until is None else min(max(until, self.at), self.now)
        self.lost[cause] += until - self.at
        self.at = until

    def _halt(self) -> None:
        began = [f for f in self._faults if f <= self.now]
        self._give(Cause.RECOMPUTE, began[-1] if began and began[-1] > self.at else None)
        self._give(Cause.DETECT)
        self._training = False

    def _resume(self, step: int, members: frozenset[int]) -> None:
        if self._training:
            self._halt()
        self._give(Cause.REGROUP if self._world else Cause.IDLE)
        for undone in [s for s in self.steps if s > step]:
            self.lost[Cause.RECOMPUTE] += self.steps.pop(undone)
            self.undone += 1
        self._training = True
        self._enter(members)

    def _enter(self, members: frozenset[int]) -> None:
        self._entering = True
        self._members = members
        self._first = not self._world
        self._world = len(members)
        self._full = max(self._full, self._world)
        self._restored = 0.0

    def _commit(self, step: int) -> None:
        if step in self.steps or (self.steps and step <= max(self.steps)):
            return  # another member of the same step
        span = self.now - self.at
        if not self._training:
            # The vote had passed as the world was told to stop.
            self.steps[step] = 0.0
            return
        self.at = self.now
        held = min(span, max(self._blocked.values(), default=0.0))
        self._blocked = {}
        self.lost[Cause.SNAPSHOT] += held
        span -= held
        pace = self._paces.get(self._world)
        if self._entering:
            rest = max(0.0, span - pace) if pace is not None else 0.0
            loaded = min(rest, self._restored)
            self.lost[Cause.TRANSFER] += loaded
            self.lost[Cause.IDLE if self._first else Cause.REGROUP] += rest - loaded
            span -= rest
        else:
            self.clean[self._world].append(span)
        best = self._paces.get(self._full)
        if self._world < self._full and best is not None and span > best:
            self.lost[Cause.DEGRADED] += span - best
            span = best
        self._entering = False
        self.steps[step] = span


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
