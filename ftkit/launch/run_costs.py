"""The costs of recovery as one run has shown them: `recovery.costs` from an event stream. Pure."""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ftkit.detection.incident import incidents
from ftkit.launch.goodput import step_paces
from ftkit.recovery.costs import Costs
from ftkit.recovery.failure_rate import FailureRate, posterior_share

Event = Mapping[str, Any]

#: What is done when memory does not hold the state.
DEEP = frozenset({"parity", "disk", "fresh"})


def run_costs(events: Iterable[Event]) -> tuple[Costs, FailureRate]:
    """What a run measured of the costs, and how often its members failed.

    Each is the median of what was seen; what was not seen stays assumed. Drills count as
    failures: a run that is broken on purpose says nothing of the machines it ran on.

    Raises:
      ValueError: there is no rank in these events.
    """
    events = sorted((e for e in events if "mono" in e), key=lambda e: float(e["mono"]))
    kinds: dict[str, list[Event]] = defaultdict(list)
    for event in events:
        kinds[str(event.get("kind"))].append(event)
    seats = {int(e["seat"]) for e in kinds["spawn"] if "seat" in e}
    if not seats:
        raise ValueError("no rank was started in this run: there is nothing to measure")
    found = incidents(events)
    memory = [e for e in kinds["restore"] if ".arena on " in str(e.get("source"))]
    disk = [e for e in kinds["restore"] if e not in memory]
    costs = Costs(world=len(seats)).with_measured(
        step_s={w: s for w, s in step_paces(events).items() if s > 0},
        detect_s=_median([i.detect_s for i in found]),
        regroup_s=_median([_apart(i.detected, i.resumed) for i in found]),
        respawn_s=_median(_joining(events)),
        restart_s=_starting(kinds),
        state_bytes=_median([e.get("bytes") for e in kinds["restore"]]),
        memory_bps=_median([_rate(e) for e in memory]),
        disk_bps=_median([_rate(e) for e in disk]),
        snapshot_block_s=_median(_blocked(kinds["snapshot"])),
        parity_round_s=_median([e.get("seconds") for e in kinds["parity"]]),
        parity_block_s=_median(
            e.get("held_s")
            for e in kinds["parity-interval"]
            if "parity_block_s" in e.get("measured", ())
        ),
        clock_gain=_median([_raised(e) for e in kinds["clock-set"]]),
        checkpoint_block_s=_median([e.get("held_s") for e in kinds["checkpoint-cost"]]),
        checkpoint_write_s=_median([e.get("seconds") for e in kinds["checkpoint"]]),
    )
    failures = sum(len(i.culprits) for i in found)
    if failures:
        deep = sum(_taken(e) in DEEP for e in kinds["decision"] if e.get("action") == "form")
        costs = costs.with_measured(
            beyond_memory=posterior_share(costs.beyond_memory, deep, max(deep, failures))
        )
    span_s = float(events[-1]["mono"]) - float(events[0]["mono"])
    return costs, FailureRate().seen(failures=failures, exposure_s=span_s * len(seats))


def _joining(events: Sequence[Event]) -> list[float]:
    """From a replacement's spawn until its seat is in the world."""
    ordered: dict[int, float] = {}
    trained, took = False, []
    for event in events:
        match event.get("kind"):
            case "commit":
                trained = True
            case "spawn" if trained and "seat" in event:
                ordered[int(event["seat"])] = float(event["mono"])
            case "decision" if event.get("action") == "grown":
                now = float(event["mono"])
                took += [now - ordered.pop(s) for s in event.get("members", ()) if s in ordered]
    return took


def _taken(event: Event) -> str:
    return str((event.get("costs") or {}).get("taken", ""))


def _starting(kinds: Mapping[str, Sequence[Event]]) -> float | None:
    """From the first process to the first step of the run."""
    if not kinds["spawn"] or not kinds["commit"]:
        return None
    return float(kinds["commit"][0]["mono"]) - float(kinds["spawn"][0]["mono"])


def _blocked(snapshots: Iterable[Event]) -> list[float]:
    """What each step's slowest rank was held up for."""
    steps: dict[int, float] = {}
    for event in snapshots:
        if "begin_s" in event and "gate_s" in event:
            held = float(event["begin_s"]) + float(event["gate_s"])
            steps[int(event["step"])] = max(steps.get(int(event["step"]), 0.0), held)
    return list(steps.values())


def _raised(event: Event) -> float | None:
    """By how much a rank's clock was raised, where it was."""
    if event.get("action") != "raised" or not event.get("before"):
        return None
    return max(1.0, float(event["mhz"]) / float(event["before"]))


def _rate(event: Event) -> float | None:
    seconds, many = float(event.get("seconds", 0)), float(event.get("bytes", 0))
    return many / seconds if seconds > 0 and many > 0 else None


def _apart(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else max(0.0, end - start)


def _median(values: Iterable[Any]) -> float | None:
    known = [float(v) for v in values if v is not None]
    return statistics.median(known) if known else None
