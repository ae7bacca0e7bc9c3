"""Faults of the link between two ranks: who is cut off from whom, how long, how slow.

The job's ranks reach each other over TCP through a relay in the drill's process, which breaks
or slows the real connections between two of them, and heals them after a while.
"""

import os
import statistics
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ftkit.core.trace import Trace
from ftkit.launch.checker import Outcome, with_more
from ftkit.launch.drills import PARTITION, Drill
from ftkit.launch.engine import Engine
from ftkit.launch.event_tail import EventTail
from ftkit.launch.relay import Relay
from ftkit.session.detour import VARIABLE

#: After so long the link is whole again.
CUT_S, SLOW_S = 3.0, 4.0
#: What a slow link carries. The bundled job has 1 MB of gradients a step.
SLOW_BYTES_PER_S = 3e6
#: Steps that take less than so many times as long were not slowed.
SLOWER = 1.5


class LinkStriker:
    """Cuts or slows a link once the job has committed the drill's step. Polled while it runs."""

    def __init__(self, drill: Drill, run_dir: Path) -> None:
        """Start the relay. Raises OSError."""
        assert drill.second_seat is not None, "a link has two ends"
        self._drill, self._run_dir = drill, run_dir
        self._ends = drill.seat, drill.second_seat
        self._tail = EventTail(run_dir)
        self._relay = Relay()
        self._heal_at: float | None = None
        self._done = False
        host, port = self._relay.address
        self.settings: dict[str, Any] = {"env": {VARIABLE: f"{host}:{port}"}}
        """What the job is told."""

    def poll(self, engine: Engine) -> None:
        """Strike, and later heal, when it is time."""
        if self._heal_at is not None:
            if time.monotonic() >= self._heal_at:
                self._relay.heal(*self._ends)
                self._tell("healed")
                self._heal_at = None
            return
        if self._done:
            return
        reached = any(
            e["kind"] == "commit" and e["step"] >= self._drill.step for e in self._tail.poll()
        )
        if not reached:
            return
        self._done = True
        if self._drill.fault == PARTITION:
            # Either end may lose its place for it.
            for seat in self._ends:
                self._tell("drill", seat=seat, member=seat)
            self._relay.cut(*self._ends)
            self._heal_at = time.monotonic() + CUT_S
        else:
            self._tell("drill")
            self._relay.slow(*self._ends, SLOW_BYTES_PER_S)
            self._heal_at = time.monotonic() + SLOW_S

    def close(self) -> None:
        """End the relay."""
        self._relay.close()

    def _tell(self, kind: str, **more: int) -> None:
        with Trace(self._run_dir / "events" / f"drill-{os.getpid()}.jsonl") as trace:
            trace.event(
                kind,
                fault=self._drill.fault,
                phase="any",
                step=self._drill.step,
                link=list(self._ends),
                **more,
            )


def judge_slow(outcome: Outcome, events: Iterable[Mapping[str, Any]]) -> Outcome:
    """The outcome with what a slow link must and must not do; pure.

    * L1 steps take longer while the link is slow, or nothing was slowed;
    * L2 nobody is put out for it: the generation lives on.
    """
    ordered = sorted(events, key=lambda e: float(e["mono"]))
    begin = next((e["mono"] for e in ordered if e["kind"] == "drill"), None)
    end = next((e["mono"] for e in ordered if e["kind"] == "healed"), float("inf"))
    problems, missing = list[str](), list[str]()
    before = slow = None
    if begin is not None:
        before, slow = _step_s(ordered, 0.0, begin), _step_s(ordered, begin, end)
        if before is None or slow is None or slow < SLOWER * before:
            missing.append(f"steps took {before} s before and {slow} s while the link was slow")
        problems += [
            f"a halt while the link was slow: {e.get('reason', '')}"
            for e in ordered
            if e["kind"] == "halt" and begin < e["mono"] < end
        ]
    return with_more(outcome, problems=problems, missing=missing, step_s=before, slow_step_s=slow)


def _step_s(events: Iterable[Mapping[str, Any]], begin: float, end: float) -> float | None:
    """The median time from commit to commit of a member in that time. None: no two."""
    last, gaps = dict[int, float](), list[float]()
    for e in events:
        if e["kind"] == "commit" and begin < e["mono"] <= end:
            if e["member"] in last:
                gaps.append(e["mono"] - last[e["member"]])
            last[e["member"]] = e["mono"]
    return round(statistics.median(gaps), 4) if gaps else None
