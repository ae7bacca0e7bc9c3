"""Measure: what came of a strike, from the events of the job around it. Pure.

The times are those of the event stream: where all processes are on one host `mono` is one clock,
and otherwise the wall clock `t` stands in for it (`on_one_clock`).
"""

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ftkit.core import exit_codes
from ftkit.core.verdict import EVICT
from ftkit.launch.drill_faults import PREEMPT
from ftkit.launch.programme.record import StrikeFigures, Survival
from ftkit.launch.programme.targets import Target
from ftkit.launch.report_history import COMPLETED, Event, History, read_history

#: Steps that every rank commits in sight before a strike: from one to the next is a step's time.
SEEN_STEPS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured(StrikeFigures):
    """What the events tell of a strike."""

    at: float | None = None
    """Unix time of the strike; None: no event tells of it."""
    others: tuple[str, ...] = ()
    """Who was lost without having been struck: one sentence each."""
    ended: str = ""
    """Why the job ended, if it did; that it did all its steps is "completed"."""
    by_hand: bool = False
    """Whether somebody ended it."""


def on_one_clock(events: Iterable[Event], *, one_host: bool) -> list[Event]:
    """The events, with a `mono` that can be compared."""
    return [e if one_host else {**e, "mono": e.get("t", e["mono"])} for e in events]


def seen_enough(events: Iterable[Event], members: Iterable[int]) -> bool:
    """Whether every member has been seen to commit so often that a step's time is known."""
    steps = Counter(e.get("member") for e in events if e["kind"] == "commit")
    return all(steps[m] >= SEEN_STEPS for m in members)


class WorldWatch:
    """Whether the world is whole again: fed the events since a little before the strike."""

    def __init__(self, target: Target, seats: int) -> None:
        self._target, self._seats = target, seats
        self._before = 0
        self._began: dict[int, set[int]] = defaultdict(set)
        self.whole = False
        """As many ranks as before have committed a new step in a newer world."""
        self.ended = False

    def feed(self, events: Iterable[Event]) -> None:
        """Take what is new."""
        for event in events:
            if event["kind"] == "end":
                self.ended = True
            if event["kind"] != "commit":
                continue
            step, generation = int(event["step"]), int(event["generation"])
            if generation <= self._target.generation:
                self._before = max(self._before, step)
            elif step > self._before:
                self._began[generation].add(int(event["member"]))
                self.whole |= len(self._began[generation]) >= self._seats


def measure(events: Sequence[Event], target: Target, seats: int) -> Measured:
    """What came of the strike at `target` of a job of so many `seats`.

    Args:
      events: of all processes, from a few steps before the strike on, on one clock.
      target: what was struck.
      seats: ranks of the full world.
    """
    history = read_history(events)
    struck: set[int] = set(target.members)
    strikes = [e for e in events if e["kind"] == "drill" and e.get("member") in struck]
    ends = [e for e in events if e["kind"] == "end"]
    ended, by_hand = "", False
    if ends:
        completed = ends[0].get("outcome") == COMPLETED
        ended = COMPLETED if completed else str(ends[0].get("reason", "")) or "without a reason"
        by_hand = ends[0].get("code") == exit_codes.INTERRUPTED
    if not strikes:
        return Measured(ended=ended, by_hand=by_hand)
    at = min(float(e["mono"]) for e in strikes)
    # When each step was committed by the last who did: commits are in order of time.
    ends_of = {c.step: c.mono for c in history.commits if c.mono <= at}
    before, step_s = max(ends_of, default=0), _step_s(ends_of)
    whole = _whole(history, at, target, seats, before)
    lost_s = None
    if whole is not None and step_s is not None:
        gained = (whole[1] - before) * step_s
        lost_s = max(0.0, whole[0] - at - gained)
    newest = max((c.step for c in history.commits if c.mono > at), default=before)
    lost, doubled = _slots(history, at)
    return Measured(
        at=min(float(e["t"]) for e in strikes),
        step=before,
        step_s=step_s,
        detect_s=_detected(history, at, struck),
        next_step_s=_next_step(history, at, target),
        whole_s=None if whole is None else whole[0] - at,
        lost_s=lost_s,
        steps_replayed=_replayed(history, at),
        steps_lost=0 if whole is not None else max(0, before - newest),
        slots_lost=lost,
        slots_doubled=doubled,
        others=_others(history, at, struck | set(target.beside)),
        ended=ended,
        by_hand=by_hand,
    )


def outcome_of(
    measured: Measured, *, waited_s: float, limit_s: float
) -> tuple[Survival, str] | None:
    """What to call it, and why it was not survived; None while that is still to be seen.

    Args:
      measured: what has been seen so far.
      waited_s: since the strike.
      limit_s: the longest that is waited for the world to be whole.
    """
    if measured.at is None and (measured.ended or waited_s > limit_s):
        return Survival.UNKNOWN, "no event tells of the strike: is the run's folder the job's?"
    if measured.whole_s is None:
        if measured.by_hand:
            return Survival.UNKNOWN, "the job was ended by hand before the world was whole"
        if measured.ended == COMPLETED:
            return Survival.UNKNOWN, "the job did its last step before the world was whole"
        if measured.ended:
            return Survival.FAILED, f"the job ended: {measured.ended}"
        if waited_s <= limit_s:
            return None
        return Survival.FAILED, f"the world was not whole again after {waited_s:.0f} s"
    if measured.others:
        return Survival.FAILED, "; ".join(measured.others)
    if measured.slots_lost or measured.slots_doubled:
        return Survival.FAILED, (
            f"{measured.slots_lost} slots of the global batch were lost, "
            f"{measured.slots_doubled} counted twice"
        )
    return Survival.SURVIVED, ""


def _step_s(ends: Mapping[int, float]) -> float | None:
    """The median time from one step to the next."""
    gaps = [ends[b] - ends[a] for a, b in pairwise(sorted(ends))]
    return statistics.median(gaps) if gaps else None


def _whole(
    history: History, at: float, target: Target, seats: int, before: int
) -> tuple[float, int] | None:
    """(when, with which step) a newer world of full size had committed one that is new."""
    began: dict[int, dict[int, tuple[float, int]]] = defaultdict(dict)
    for c in history.commits:
        if c.mono > at and c.generation > target.generation and c.step > before:
            began[c.generation].setdefault(c.member, (c.mono, c.step))
            if len(began[c.generation]) >= seats:
                return c.mono, max(step for _, step in began[c.generation].values())
    return None


def _detected(history: History, at: float, struck: set[int]) -> float | None:
    said = [a.mono for a in history.named if a.member in struck]
    after = [mono for mono in (*said, *history.halts) if mono >= at]
    return min(after) - at if after else None


def _next_step(history: History, at: float, target: Target) -> float | None:
    """Until every survivor had committed its next step.

    A vote that was passing at the strike may end in a commit of the old world a moment after it,
    which shows nothing; unless ranks leave with notice, and nobody is held up.
    """
    floor = target.generation - (target.fault == PREEMPT)
    survivors = {c.member for c in history.commits if c.mono <= at} - set(target.members)
    survivors -= {e.member for e in history.exits}
    first: dict[int, float] = {}
    for c in history.commits:
        if c.mono > at and c.generation > floor and c.member in survivors:
            first.setdefault(c.member, c.mono)
    return max(first.values()) - at if survivors and len(first) == len(survivors) else None


def _replayed(history: History, at: float) -> int:
    """How many steps somebody committed again after the strike."""
    newest: dict[int, int] = {}
    again = set()
    for c in history.commits:
        if c.mono > at and c.step <= newest.get(c.member, -1):
            again.add(c.step)
        newest[c.member] = max(newest.get(c.member, -1), c.step)
    return len(again)


def _slots(history: History, at: float) -> tuple[int, int] | tuple[None, None]:
    """(slots lost, slots doubled) of all attempts that were committed in sight from vote to commit.

    Some ranks' first votes may be older than the first event, and some of the last not be read yet.
    """
    first: dict[int, int] = {}
    for v in history.votes:
        if v.mono <= at:
            first.setdefault(v.member, v.step)
    begun, newest = (
        max(first.values(), default=0),
        max((c.step for c in history.commits), default=0),
    )
    steps = {c.step for c in history.commits if begun < c.step < newest}
    wanted = range(max((s for v in history.votes for s in v.slots), default=-1) + 1)
    if not wanted or not steps:
        return None, None
    attempts = {(c.step, c.vote.generation) for c in history.commits if c.vote is not None}
    last = {(v.step, v.generation, v.member): v.slots for v in history.votes}
    held: dict[tuple[int, int], Counter[int]] = defaultdict(Counter)
    for (step, generation, _), slots in last.items():
        held[step, generation].update(slots)
    lost = doubled = 0
    for step, generation in attempts:
        if step in steps:
            counted = held[step, generation]
            lost += (Counter(wanted) - counted).total()
            doubled += (counted - Counter(wanted)).total()
    return lost, doubled


def _others(history: History, at: float, struck: set[int]) -> tuple[str, ...]:
    """Who went, or was judged, and had not been struck."""
    end = float("inf") if history.ended is None else history.ended
    gone = {
        e.member: f"rank {e.seat}, which was not struck, left with "
        + (f"signal {e.signal}" if e.signal else f"code {e.code}")
        for e in history.exits
        if not e.clean and at < e.mono < end and e.member not in struck
    }
    judged = {
        a.member: f"rank {a.seat}, which was not struck, was judged {a.fault}: {a.reason}"
        for a in history.accusations
        if a.fault in EVICT and at < a.mono < end and a.member not in struck
    }
    return tuple((judged | gone).values())
