"""Faults of links: who is cut off from whom, or slow, or silent; how long; and who is to be named.

The job's ranks reach each other over TCP through a relay in the drill's process, which breaks,
slows or holds the real connections between two of them, and heals them after a while. The
agents' pair tests take the same way.
"""

import os
import random
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftkit.core.detour import CONTROL, COORDINATOR, VARIABLE, agent_end
from ftkit.core.ids import NodeId
from ftkit.core.trace import Trace
from ftkit.core.verdict import Fault
from ftkit.detection.paths import Where
from ftkit.launch.checker import Outcome, with_more
from ftkit.launch.drill_catalogue import (
    BLACKHOLE,
    PARTITION,
    PARTITION_HALF,
    PARTITION_MINORITY,
    SLOW_LINK,
    SLOW_NIC,
)
from ftkit.launch.drill_job import Job
from ftkit.launch.drill_plan import Drill
from ftkit.launch.engine import Engine
from ftkit.launch.event_tail import EventTail
from ftkit.launch.relay import Relay, Way

#: After so long the link is whole again.
CUT_S, SLOW_S = 3.0, 10.0
#: Halves of a job find each other again once the one goes on, or so many stalls later.
APART_STALLS = 6
#: At most, so that a node out of reach is given up soon.
APART_STALL_S = 3.0
#: A link that carries nothing is healed once it is named, or this many stalls later.
HELD_STALLS = 4
#: What a slow link carries. The bundled job has 1 MB of gradients a step.
SLOW_BYTES_PER_S = 3e6
#: Steps that take less than so many times as long were not slowed.
SLOWER = 1.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Culprit:
    """Who is to be named, and for what."""

    fault: Fault
    where: Where
    seat: int
    peer: int | None
    ways: tuple[Way, ...]
    """What is broken: from a seat to another."""

    @property
    def name(self) -> tuple[object, ...]:
        """As verdicts say it."""
        return (self.fault.value, self.where.value, self.seat, self.peer)


def culprit(drill: Drill, size: int) -> Culprit | None:
    """Who a drill of links is about; None for one in which nobody is named. Pure."""
    a, b = drill.seat, drill.second_seat
    assert b is not None, "a link has two ends"
    both = ((a, b), (b, a))
    fault = Fault.HANG_COMM if drill.fault == BLACKHOLE else Fault.SLOW_COMM
    if drill.fault in (SLOW_LINK, BLACKHOLE):
        low, high = sorted((a, b))
        return Culprit(fault=fault, where=Where.LINK, seat=low, peer=high, ways=both)
    if drill.fault != SLOW_NIC:
        return None
    rng = random.Random(f"{drill.fault} where {drill.seed}")
    where = rng.choice((Where.EGRESS, Where.INGRESS, Where.NIC))
    others = [seat for seat in range(size) if seat != a]
    out = [(a, other) for other in others] if where is not Where.INGRESS else []
    back = [(other, a) for other in others] if where is not Where.EGRESS else []
    return Culprit(fault=fault, where=where, seat=a, peer=None, ways=(*out, *back))


def apart(far: Sequence[int], size: int) -> list[tuple[int, int]]:
    """The links that are cut where `far` seats are on one side, and the coordinator on the other.

    Those between ranks, between agents, and of the coordinator to agents; a rank on each node.
    """
    near = [seat for seat in range(size) if seat not in far]
    agents = [(agent_end(NodeId(a)), agent_end(NodeId(b))) for a in near for b in far]
    led = [(COORDINATOR, agent_end(NodeId(b))) for b in far]
    return [*((a, b) for a in near for b in far), *agents, *led]


class LinkStriker:
    """Strikes once the job has committed the drill's step and its paths are known. Polled."""

    def __init__(self, drill: Drill, job: Job, run_dir: Path) -> None:
        """Start the relay. Raises OSError."""
        assert drill.second_seat is not None, "a link has two ends"
        self._drill, self._run_dir = drill, run_dir
        self._ends = drill.seat, drill.second_seat
        self._size = job.world_size
        self._culprit = culprit(drill, job.world_size)
        self._latest = job.steps * 3 // 5
        self._apart_s = APART_STALLS * job.max_stall_s
        self._held_s = HELD_STALLS * job.max_stall_s
        self._tail = EventTail(run_dir)
        self._relay = Relay()
        self._heal_at: float | None = None
        self._step = 0
        self._measured = self._named = self._done = False
        host, port = self._relay.address
        self.settings: dict[str, Any] = {"env": {VARIABLE: f"{host}:{port}"}}
        """What the job is told."""
        if drill.fault == PARTITION_HALF:
            self.settings["env"][CONTROL] = "1"
        self._generation = 0
        self._went_on = False
        """Whether a world was entered since the halves fell apart, and trained."""

    def poll(self, engine: Engine) -> None:
        """Strike, and later heal, when it is time."""
        for event in self._tail.poll():
            self._take(event)
        if self._heal_at is not None:
            seen = self._drill.fault == BLACKHOLE and self._named
            seen |= self._drill.fault == PARTITION_HALF and self._went_on
            if seen or time.monotonic() >= self._heal_at:
                self._relay.heal()
                self._tell("healed")
                self._heal_at = None
            return
        # What is slow is told from how it was before.
        ready = self._measured or self._step >= self._latest or self._culprit is None
        if self._done or self._step < self._drill.step or not ready:
            return
        self._done = True
        self._strike()

    def close(self) -> None:
        """End the relay."""
        self._relay.close()

    def _take(self, event: Mapping[str, Any]) -> None:
        match event["kind"]:
            case "commit":
                self._step = max(self._step, int(event["step"]))
                self._went_on |= self._done and int(event["generation"]) > self._generation
                if not self._done:
                    self._generation = max(self._generation, int(event["generation"]))
            case "probed":
                self._measured = True
            case "verdict" if self._culprit is not None:
                self._named = self._named or _said(event) == self._culprit.name

    def _strike(self) -> None:
        if self._drill.fault == PARTITION:
            # Either end may lose its place for it.
            for seat in self._ends:
                self._tell("drill", seat=seat, member=seat)
            self._relay.cut(*self._ends)
            lasts_s = CUT_S
        elif self._drill.fault == PARTITION_MINORITY:
            alone = self._drill.seat
            self._tell("drill", seat=alone, member=alone)
            for seat in set(range(self._size)) - {alone}:
                self._relay.cut(alone, seat)
            lasts_s = CUT_S
        elif self._drill.fault == PARTITION_HALF:
            far = self._drill.seats
            for seat in far:
                self._tell("drill", seat=seat, member=seat)
            for a, b in apart(far, self._size):
                self._relay.cut(a, b)
            lasts_s = self._apart_s
        elif self._drill.fault == BLACKHOLE:
            self._tell("drill")
            self._relay.hold(*self._ends)
            lasts_s = self._held_s
        else:
            assert self._culprit is not None, "somebody is slow"
            self._tell("drill")
            self._relay.slow(self._culprit.ways, SLOW_BYTES_PER_S)
            lasts_s = SLOW_S
        self._heal_at = time.monotonic() + lasts_s

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


def judge_link(
    outcome: Outcome, drill: Drill, size: int, events: Iterable[Mapping[str, Any]]
) -> Outcome:
    """The outcome with what a fault of links must and must not do; pure.

    * L1 steps take longer while a link is slow, or nothing was slowed;
    * L2 nobody is put out for it: the generation lives on;
    * L3 the link or NIC is named, with the direction, as the first of all;
    * L4 nothing else is named for communication, before or after.
    """
    ordered = sorted(events, key=lambda e: float(e["mono"]))
    if drill.fault == PARTITION_HALF:
        return _judge_half(outcome, set(drill.seats), size, ordered)
    begin = next((e["mono"] for e in ordered if e["kind"] == "drill"), None)
    wanted = culprit(drill, size)
    if begin is None or wanted is None:
        return outcome
    end = next((e["mono"] for e in ordered if e["kind"] == "healed"), float("inf"))
    problems, missing = list[str](), list[str]()
    before = slow = None
    if drill.fault != BLACKHOLE:
        before, slow = _step_s(ordered, 0.0, begin), _step_s(ordered, begin, end)
        if before is None or slow is None or slow < SLOWER * before:
            missing.append(f"steps took {before} s before and {slow} s while the link was slow")
    problems += [
        f"a halt while the link was bad: {e.get('reason', '')}"
        for e in ordered
        if e["kind"] == "halt" and begin < e["mono"] < end
    ]
    said = [e for e in ordered if e["kind"] == "verdict" and e["fault"] in _OF_LINKS]
    right = next((e for e in said if _said(e) == wanted.name and e["mono"] > begin), None)
    if right is None:
        problems.append(f"{wanted.name} was not named")
    problems += [
        f"named instead: {_said(e)}: {e['reason']}"
        for e in said
        if _said(e) != wanted.name or e["mono"] < begin
    ]
    return with_more(
        outcome,
        problems=problems,
        missing=missing,
        step_s=before,
        slow_step_s=slow,
        **_how_soon(ordered, begin, right),
    )


def _judge_half(
    outcome: Outcome, far: set[int], size: int, ordered: Sequence[Mapping[str, Any]]
) -> Outcome:
    """The outcome with the rules of halves added; pure.

    * Q1 while the halves are apart, the coordinator's commits steps in a world of its own;
    * Q2 the other commits none, but for a vote that had passed: it stands still;
    * Q3 once they find each other, every seat is taken again.
    """
    begin = next((e["mono"] for e in ordered if e["kind"] == "drill"), None)
    end = next((e["mono"] for e in ordered if e["kind"] == "healed"), None)
    if begin is None or end is None:
        return with_more(outcome, problems=[], missing=["the halves did not fall apart and heal"])
    commits = [e for e in ordered if e["kind"] == "commit"]
    before = max((e["generation"] for e in commits if e["mono"] <= begin), default=0)
    alone = [e for e in commits if begin < e["mono"] <= end and e["generation"] > before]
    strays = sorted({e["seat"] for e in alone} & far)
    problems = [f"seats {strays} trained apart from the coordinator"] if strays else []
    if not {e["seat"] for e in alone} - far:
        problems.append("the coordinator's half did not go on by itself")
    sizes = [
        len(e["members"])
        for e in ordered
        if e["kind"] == "decision"
        and e["action"] in ("form", "resume", "grown")
        and e["mono"] > end
    ]
    missing = [] if size in sizes else [f"the world was not whole again: {sizes}"]
    steps = sorted({e["step"] for e in alone})
    return with_more(
        outcome,
        problems=problems,
        missing=missing,
        apart_s=round(end - begin, 3),
        steps_apart=len(steps),
        far=sorted(far),
    )


_OF_LINKS = (Fault.SLOW_COMM.value, Fault.HANG_COMM.value)


def _said(event: Mapping[str, Any]) -> tuple[object, ...]:
    """What a verdict names."""
    where = event["evidence"].get("where")
    return (event["fault"], where, event["seat"], event["peer"])


def _how_soon(
    ordered: Iterable[Mapping[str, Any]], begin: float, right: Mapping[str, Any] | None
) -> dict[str, object]:
    """Seconds and steps from the fault to the word, and of these, the probe's seconds."""
    if right is None:
        return {"named_s": None, "suspect_steps": None, "probe_s": None}
    probe_s = float(right["evidence"]["probe_s"])
    suspected = right["mono"] - probe_s
    steps = {e["step"] for e in ordered if e["kind"] == "commit" and begin < e["mono"] <= suspected}
    return {
        "named_s": round(right["mono"] - begin, 3),
        "suspect_steps": len(steps),
        "probe_s": probe_s,
    }


def _step_s(events: Iterable[Mapping[str, Any]], begin: float, end: float) -> float | None:
    """The median time from commit to commit of a member in that time. None: no two."""
    last, gaps = dict[int, float](), list[float]()
    for e in events:
        if e["kind"] == "commit" and begin < e["mono"] <= end:
            if e["member"] in last:
                gaps.append(e["mono"] - last[e["member"]])
            last[e["member"]] = e["mono"]
    return round(statistics.median(gaps), 4) if gaps else None
