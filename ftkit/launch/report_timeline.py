"""What each seat was doing when: spans and marks for the picture of an incident. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from ftkit.launch.report_history import Event, History, read_history
from ftkit.launch.report_incidents import read_incidents

#: What is shown around the incidents, in committed steps of any seat.
_STEPS_BEFORE = 4
_STEPS_AFTER = 3


class Doing(StrEnum):
    """What a seat is doing."""

    TRAINING = "training"
    REPAIRING = "repairing"
    """Told to stop and regroup, until its next commit."""
    LOST = "lost"
    """Its member is gone, stopped or hung, and no other has started."""
    JOINING = "joining"
    """A process was started and does not train yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """One seat doing one thing from `start` to `end`, monotonic seconds."""

    seat: int
    doing: Doing
    start: float
    end: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """One moment of a seat: a committed step, or (text not empty) something to point at."""

    seat: int | None
    at: float
    step: int
    text: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """The picture's content, cut to the window that holds the incidents."""

    start: float
    end: float
    seats: tuple[int, ...]
    spans: tuple[Span, ...]
    commits: tuple[Mark, ...]
    faults: tuple[Mark, ...]


def read_timeline(
    events: Iterable[Event], *, whole: bool = True, last_s: float | None = None
) -> Timeline:
    """Work out the spans of every seat. Without any event the timeline is empty.

    Args:
      events: all events of a run, in any order.
      whole: show until the lost seats are back; False: until the survivors go on, which is
        a small part of it, since starting a process takes far longer than the repair.
      last_s: show the last so many seconds up to the newest event instead, whatever happened.
    """
    listed = [e for e in events if isinstance(e.get("mono"), int | float)]
    listed.sort(key=lambda e: float(e["mono"]))
    history = read_history(listed)
    if last_s is None or not listed:
        start, end = _window(history, whole)
    else:
        end = float(listed[-1]["mono"])
        start = max(end - last_s, float(listed[0]["mono"]))
    turns = _turns(listed, history)
    spans = []
    for seat, changes in sorted(turns.items()):
        changes.sort(key=lambda change: change[0])
        ends = [at for at, _ in changes[1:]] + [_last(history)]
        for (at, doing), until in zip(changes, ends, strict=True):
            if doing is not None and until > start and at < end and until > at:
                cut = Span(seat=seat, doing=doing, start=max(at, start), end=min(until, end))
                spans.append(cut)
    return Timeline(
        start=start,
        end=end,
        seats=tuple(sorted(turns)),
        spans=tuple(_merged(spans)),
        commits=tuple(
            Mark(seat=c.seat, at=c.mono, step=c.step)
            for c in history.commits
            if start <= c.mono <= end
        ),
        faults=tuple(
            Mark(seat=i.seat, at=i.mono, step=0, text=f"{i.fault} at {i.phase}")
            for i in history.injections
            if last_s is None or start <= i.mono <= end
        ),
    )


def _last(history: History) -> float:
    moments = [a.mono for a in history.acts] + [f.mono for f in history.finals]
    return max(moments, default=0.0)


def _window(history: History, whole: bool) -> tuple[float, float]:
    commits = [c.mono for c in history.commits]
    if not commits:
        return 0.0, 0.0
    incidents = read_incidents(history, evicts=True)
    if not incidents:
        return commits[0], commits[-1]
    first = incidents[0].at
    before = sorted({c.mono for c in history.commits if c.mono <= first})
    # Every seat commits a step at its own moment, so a step is about one moment a seat.
    seats = max(1, len({c.seat for c in history.commits}))
    start = before[-_STEPS_BEFORE * seats :][:1] or [first]
    settled = first
    for incident in incidents:
        returned = [
            c.mono
            for c in history.commits
            if whole
            and c.seat == incident.seat
            and c.step == incident.back_at_step
            and c.mono > incident.at
        ]
        settled = max(settled, *returned, incident.at + (incident.repair_s or 0.0))
    after = sorted({c.mono for c in history.commits if c.mono > settled})
    end = after[: _STEPS_AFTER * seats][-1:] or [_last(history)]
    return start[0], end[0]


def _turns(events: list[Event], history: History) -> dict[int, list[tuple[float, Doing | None]]]:
    """For each seat, the moments at which what it does changes; None: it has finished."""
    turns: dict[int, list[tuple[float, Doing | None]]] = {}
    lost_at: dict[int, float] = {}
    for injection in history.injections:
        if injection.member is not None:
            lost_at[injection.member] = injection.mono
    for leave in history.exits:
        if not leave.clean:
            lost_at.setdefault(leave.member, leave.mono)
    for member, at in lost_at.items():
        seat = history.seat_of.get(member)
        if seat is not None:
            turns.setdefault(seat, []).append((at, Doing.LOST))

    first_act: dict[int, float] = {}
    for act in sorted(history.acts, key=lambda a: a.mono):
        first_act.setdefault(act.member, act.mono)
    for event in events:
        if event.get("kind") == "spawn" and isinstance(event.get("seat"), int):
            turns.setdefault(event["seat"], []).append((float(event["mono"]), Doing.JOINING))
    for member, at in first_act.items():
        turns.setdefault(history.seat_of[member], []).append((at, Doing.TRAINING))

    # A broken link ends a rank's step before anybody tells it to halt: the first sign counts.
    stops = [(at, member) for at in history.halts for member in first_act]
    stops += [(r.mono, r.member) for r in history.rewinds if r.member in first_act]
    for at, member in stops:
        again = [c.mono for c in history.commits if c.member == member and c.mono > at]
        if first_act[member] <= at < lost_at.get(member, float("inf")) and again:
            seat = history.seat_of[member]
            turns[seat] += [(at, Doing.REPAIRING), (min(again), Doing.TRAINING)]
    for final in history.finals:
        turns.setdefault(final.seat, []).append((final.mono, None))
    return turns


def _merged(spans: list[Span]) -> list[Span]:
    """Spans of the same seat that touch and do the same become one."""
    merged: list[Span] = []
    for span in spans:
        last = merged[-1] if merged else None
        if last and (last.seat, last.doing, last.end) == (span.seat, span.doing, span.start):
            merged[-1] = Span(seat=span.seat, doing=span.doing, start=last.start, end=span.end)
        else:
            merged.append(span)
    return merged
