"""Step logs read: how long it took to train again after a fault, and what it cost; pure.

Which steps came *after* a fault is not a matter of time alone: a rank that is a moment behind
finishes an old step when another has already been struck in the next one. A step counts as new
when it is the struck one or a later one, or when training had (re)started in its process since.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Event = Mapping[str, Any]

#: By process id, each in the order written.
Logs = Mapping[int, Sequence[Event]]

#: Steps at the beginning whose times are left out.
WARM = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """What followed a fault. Seconds after it; None: it did not happen."""

    again_s: float | None
    """Until the last rank of the world that trains next has finished a step, whichever."""
    ahead_s: float | None
    """The same, of the struck step or a later one: until nothing is done a second time."""
    survivors_lost: int
    """Ranks that were not struck and never trained on, though others of them did."""
    repeated: int
    """Steps that had been finished before and were done once more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batches:
    """What the finished steps, each as it was done last, were made of."""

    steps: int
    """Steps finished."""
    lost: int
    """Blocks of their global batches that are in no gradient."""
    doubled: int
    """Blocks that count more than once."""


def strike_of(logs: Logs) -> Event | None:
    """The moment of the fault, if it came to it."""
    return next((e for events in logs.values() for e in events if e["kind"] == "strike"), None)


def recovery(logs: Logs) -> Recovery:
    """What followed the strike.

    The world that trains next is the ranks that survived, where any of them went on in its
    process; else the processes that had (re)started training when the first new step was finished.

    Raises:
      ValueError: nobody was struck.
    """
    strike = strike_of(logs)
    if strike is None:
        raise ValueError("no process says that it was struck")
    at, struck = float(strike["mono"]), int(strike["step"])
    victim = next(pid for pid, events in logs.items() if strike in events)
    old, new = _commits(logs, strike)
    survivors = {pid for pid in old if pid != victim and old[pid]}
    went_on = {pid for pid in survivors if new[pid]}
    if went_on:
        world = went_on
    else:
        first = min((e["mono"] for events in new.values() for e in events), default=None)
        world = {
            pid
            for pid, events in logs.items()
            if first is not None and new[pid] and events[0]["mono"] <= first
        }
    before = {e["step"] for events in old.values() for e in events}
    after = {e["step"] for pid in world for e in new[pid]}
    return Recovery(
        again_s=_last(at, ([e["mono"] for e in new[pid]] for pid in world)),
        ahead_s=_last(at, ([e["mono"] for e in new[pid] if e["step"] >= struck] for pid in world)),
        survivors_lost=len(survivors - went_on) if went_on else 0,
        repeated=len(before & after),
    )


def batches(logs: Logs, *, slots: int) -> Batches:
    """What the result was trained on, where every step has `slots` blocks."""
    old, new = _commits(logs, strike_of(logs))
    seen = dict[int, list[int]]()
    for era in (old, new):
        finished = dict[int, list[int]]()
        for events in era.values():
            for e in events:
                finished.setdefault(e["step"], []).extend(e["blocks"])
        seen |= finished  # a step done again replaces what it was
    return Batches(
        steps=len(seen),
        lost=sum(slots - len(set(blocks)) for blocks in seen.values()),
        doubled=sum(len(blocks) - len(set(blocks)) for blocks in seen.values()),
    )


def intervals(logs: Logs) -> list[float]:
    """Seconds between the steps of each process, one after another, the first ones left out."""
    times = [
        [float(e["mono"]) for e in events if e["kind"] == "commit"] for events in logs.values()
    ]
    return [b - a for each in times for a, b in zip(each[WARM:], each[WARM + 1 :], strict=False)]


def median(values: Iterable[float | None]) -> float | None:
    """The median of what there is; None of nothing."""
    there = [value for value in values if value is not None]
    return statistics.median(there) if there else None


def _commits(
    logs: Logs, strike: Event | None
) -> tuple[dict[int, list[Event]], dict[int, list[Event]]]:
    """The finished steps of every process, of before the strike and after it."""
    old, new = dict[int, list[Event]](), dict[int, list[Event]]()
    for pid, events in logs.items():
        old[pid], new[pid] = [], []
        fresh = False
        for e in events:
            later = strike is not None and e["mono"] > strike["mono"]
            fresh |= later and e["kind"] == "begin"
            if e["kind"] == "commit":
                is_new = later and strike is not None and (fresh or e["step"] >= strike["step"])
                (new if is_new else old)[pid].append(e)
    return old, new


def _last(at: float, moments: Iterable[Sequence[float]]) -> float | None:
    """When the last of several reached its first moment; None if one never did, or there is none."""
    firsts = [min(each, default=None) for each in moments]
    there = [first for first in firsts if first is not None]
    return round(max(there) - at, 6) if there and len(there) == len(firsts) else None
