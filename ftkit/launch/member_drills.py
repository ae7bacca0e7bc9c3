"""Faults of members over time: a rank that flaps, one that joins, and churn. Who, and when.

They strike from outside, by SIGKILL to a process that the events name, because which process
will sit in a seat, and when it will be back, nobody can plan.
"""

import os
import random
import signal
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from ftkit.core.trace import Trace
from ftkit.launch.checker import Outcome, with_more
from ftkit.launch.drill_catalogue import CHURN, FLAP, JOIN, STRIKES
from ftkit.launch.drill_faults import PREEMPT
from ftkit.launch.drill_job import Job
from ftkit.launch.drill_plan import Drill
from ftkit.launch.engine import Engine
from ftkit.launch.event_tail import EventTail
from ftkit.recovery.budget import BudgetConfig

#: Between two strikes of churn, in seconds.
PAUSE_S = (0.5, 2.0)
CHURN_STRIKES_MAX = 12

#: Steps that may be committed until a spare is in.
SPARE_STEPS = 2


@dataclass(slots=True)
class _Sitting:
    """Who sits in a seat now."""

    member: int
    pid: int
    first: int = 0
    """The first step it committed; 0 before that."""
    last: int = 0


class MemberStriker:
    """Kills members as `flap`, `join` or `churn` ask for it. Polled while the job runs.

    One that has not yet committed as many steps as the job's budget calls progress is spared:
    a seat that fails again and again without progress ends the job, as it should.
    """

    def __init__(self, drill: Drill, job: Job, run_dir: Path) -> None:
        self._drill, self._run_dir = drill, run_dir
        self._rng = random.Random(drill.seed)
        # Somebody has to be there all along, to be looked at.
        others = [seat for seat in range(job.world_size) if seat != drill.seat]
        self._seats = [drill.seat]
        if drill.fault == CHURN:
            self._seats += self._rng.sample(others, len(others) - 1)
        self._left = {FLAP: STRIKES[FLAP], JOIN: 1, CHURN: CHURN_STRIKES_MAX}[drill.fault]
        # Time for the last one to come back.
        self._until = job.steps * 2 // 3
        self._size = job.world_size
        self._tail = EventTail(run_dir)
        self._sitting: dict[int, _Sitting] = {}
        self._step = 0
        self._next_s = 0.0

    def poll(self, engine: Engine) -> None:
        """Strike when it is time."""
        for event in self._tail.poll():
            self._take(event)
        seat = self.due(time.monotonic())
        if seat is not None:
            self._strike(seat)

    def due(self, now: float) -> int | None:
        """The seat to strike now, if any."""
        if (
            not self._left
            or not self._drill.step <= self._step <= self._until
            or now < self._next_s
        ):
            return None
        steps = BudgetConfig().progress_steps
        ripe = [
            seat
            for seat in self._seats
            if (one := self._sitting.get(seat)) and one.first and one.last - one.first >= steps
        ]
        training = sum(1 for one in self._sitting.values() if one.first)
        if not ripe or training < 2:
            return None
        return self._rng.choice(ripe)

    def _take(self, event: Mapping[str, Any]) -> None:
        match event["kind"]:
            case "spawn":
                self._sitting[event["seat"]] = _Sitting(event["member"], event["pid"])
            case "exit" if self._member(event) is not None:
                del self._sitting[event["seat"]]
            case "commit":
                self._step = max(self._step, event["step"])
                if one := self._member(event):
                    one.first = one.first or event["step"]
                    one.last = event["step"]

    def _member(self, event: Mapping[str, Any]) -> _Sitting | None:
        one = self._sitting.get(event["seat"])
        return one if one is not None and one.member == event["member"] else None

    def _strike(self, seat: int) -> None:
        one = self._sitting.pop(seat)
        self._left -= 1
        if self._drill.fault == CHURN:
            self._next_s = time.monotonic() + self._rng.uniform(*PAUSE_S)
        with Trace(self._run_dir / "events" / f"drill-{os.getpid()}.jsonl") as trace:
            trace.event(
                "drill",
                fault=self._drill.fault,
                phase="any",
                seat=seat,
                member=one.member,
                step=self._step,
            )
        try:
            os.kill(one.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # it ended this instant, which the checker will have something to say about


class Preempter:
    """Tells one node that it is about to be taken away, once the job has committed the drill's step."""

    def __init__(self, drill: Drill, job: Job, run_dir: Path) -> None:
        self._drill, self._run_dir = drill, run_dir
        self._node = drill.seat // job.nproc
        self._seats = range(self._node * job.nproc, (self._node + 1) * job.nproc)
        self._tail = EventTail(run_dir)
        self._members: dict[int, int] = {}
        self._done = False

    def poll(self, engine: Engine) -> None:
        """Strike when it is time."""
        reached = False
        for event in self._tail.poll():
            if event["kind"] == "spawn":
                self._members[event["seat"]] = event["member"]
            reached |= event["kind"] == "commit" and event["step"] >= self._drill.step
        if self._done or not reached:
            return
        self._done = True
        with Trace(self._run_dir / "events" / f"drill-{os.getpid()}.jsonl") as trace:
            for seat in self._seats:
                trace.event(
                    "drill",
                    fault=PREEMPT,
                    phase="any",
                    seat=seat,
                    member=self._members[seat],
                    step=self._drill.step,
                )
        engine.drain_node(self._node)


def judge_preempt(outcome: Outcome, events: Iterable[Mapping[str, Any]]) -> Outcome:
    """The outcome with the rules of notices added; pure.

    * N1 the ranks of the node leave by themselves, at the end of a step;
    * N2 until they have, nobody stands still and nobody plays a step again;
    * N3 once another agent has come for the node, its seats are filled again.
    """
    ordered = sorted(events, key=lambda e: float(e["mono"]))
    struck = [e for e in ordered if e["kind"] == "drill"]
    if not struck:
        return with_more(outcome, problems=[], missing=["the notice was not given"])
    at, members = float(struck[0]["mono"]), {e["member"] for e in struck}
    left = {e["member"]: e for e in ordered if e["kind"] == "left"}
    problems = [f"member {m} did not leave by itself" for m in sorted(members - left.keys())]
    until = max((float(e["mono"]) for m, e in left.items() if m in members), default=at)
    problems += [
        f"a {e['kind']} ({e.get('reason', '')}) before the node was left"
        for e in ordered
        if e["kind"] in ("report", "rollback", "halt") and at < float(e["mono"]) <= until
    ]
    back = {e["seat"] for e in ordered if e["kind"] == "commit" and float(e["mono"]) > until}
    away = sorted({e["seat"] for e in struck} - back)
    return with_more(
        outcome,
        problems=problems,
        missing=[f"seats {away} were not back before the job ended"] if away else [],
        left_at_steps=sorted(e["step"] for m, e in left.items() if m in members),
        left_s=round(until - at, 3),
    )


def judge_join(outcome: Outcome, events: Iterable[Mapping[str, Any]]) -> Outcome:
    """The outcome with the rule of joins added; pure.

    * J1 from the repair until the newcomer is in, nobody stands still and nobody rolls back.
    """
    ordered = sorted(events, key=lambda e: float(e["mono"]))
    struck = next((e for e in ordered if e["kind"] == "drill"), None)
    problems, missing, joined = list[str](), list[str](), list[dict[str, object]]()
    admitted = [
        e
        for e in ordered
        if struck
        and e["kind"] == "admit"
        and e["seat"] == struck["seat"]
        and e["mono"] > struck["mono"]
    ]
    if struck is None or not admitted:
        missing.append("nobody came in after the fault")
    else:
        at = admitted[0]
        commits = [
            e
            for e in ordered
            if e["kind"] == "commit" and e["mono"] > struck["mono"] and e["member"] != at["member"]
        ]
        before = [
            e["generation"]
            for e in ordered
            if e["kind"] == "commit" and e["mono"] <= struck["mono"]
        ]
        # A vote that was passing as the fault struck ends in a commit, and repairs nothing.
        newer = [e["mono"] for e in commits if e["generation"] > max(before, default=0)]
        repaired = min(newer, default=at["mono"])
        held_up = [
            e
            for e in ordered
            if e["kind"] in ("report", "rollback", "halt")
            and repaired < e["mono"] <= at["mono"]
            and e.get("member") != at["member"]
        ]
        problems += [
            f"a {e['kind']} ({e.get('reason', '')}) while member {at['member']} came in"
            for e in held_up
        ]
        joined.append({"member": at["member"], "step": at["step"], "longest_gap_s": _gap(commits)})
    return with_more(outcome, problems=problems, missing=missing, joined=joined)


def _gap(commits: Iterable[Mapping[str, Any]]) -> float:
    """The longest time between two commits, one after another, of the same member."""
    last, longest = dict[int, float](), 0.0
    for e in commits:
        if e["member"] in last:
            longest = max(longest, e["mono"] - last[e["member"]])
        last[e["member"]] = e["mono"]
    return round(longest, 3)


def judge_shrink_grow(outcome: Outcome, events: Iterable[Mapping[str, Any]], size: int) -> Outcome:
    """The outcome with the rule of shrinking and growing added; pure.

    * G1 there was a world of every size from `size` - 1 down to `size` - 2, and then, later, one of
      `size` again.
    """
    sizes = [
        len(e["members"])
        for e in sorted(events, key=lambda e: float(e["mono"]))
        if e["kind"] == "decision" and e["action"] in ("form", "resume", "grown")
    ]
    missing = list[str]()
    if size - 2 not in sizes:
        missing.append(f"the second loss did not come before the first was made good: {sizes}")
    elif size not in sizes[sizes.index(size - 2) :]:
        missing.append(f"the world did not grow back to {size}: {sizes}")
    return with_more(outcome, problems=[], missing=missing, world_sizes=sizes)


def judge_stage_lost(outcome: Outcome, events: Iterable[Mapping[str, Any]], size: int) -> Outcome:
    """The outcome with the rules of pipelines added; pure.

    * P1 after the fault the layers are cut over the stages that are left, by what was measured;
    * P2 once every seat is taken again the cut is the first one.
    """
    cuts = [
        (tuple(e["bounds"]), str(e["reason"]))
        for e in sorted(events, key=lambda e: float(e["mono"]))
        if e["kind"] == "cut"
    ]
    bounds = list(dict.fromkeys(b for b, _ in cuts))
    problems, missing = list[str](), list[str]()
    smaller = [(b, why) for b, why in cuts if len(b) <= size]
    if not smaller:
        missing.append("the layers were never cut over fewer stages")
    elif not any("measured" in why for _, why in smaller):
        problems.append(f"the smaller cut was not by measured times: {smaller[0][1]}")
    elif len(cuts[-1][0]) <= size:
        missing.append(f"the lost stage did not come back: the last cut is {cuts[-1][0]}")
    if full := [b for b in bounds if len(b) == size + 1][1:]:
        problems.append(f"with every seat taken the layers were cut otherwise: {full}")
    return with_more(outcome, problems=problems, missing=missing, cuts=[list(b) for b in bounds])


def judge_spare(outcome: Outcome, events: Iterable[Mapping[str, Any]]) -> Outcome:
    """The outcome with the rules of spares added; pure.

    * H1 a rank that stood by is let in after the fault, and was started before it;
    * H2 at most two steps are committed without it.
    """
    ordered = sorted(events, key=lambda e: float(e["mono"]))
    struck = next((e for e in ordered if e["kind"] == "drill"), None)
    if struck is None:
        return with_more(outcome, problems=[], missing=["the fault did not strike"])
    at = float(struck["mono"])
    started = {e["member"] for e in ordered if e["kind"] == "spawn" and e["mono"] < at}
    trained = {e["member"] for e in ordered if e["kind"] == "commit" and e["mono"] < at}
    let_in = [
        e
        for e in ordered
        if e["kind"] == "admit" and e["mono"] > at and e["member"] in started - trained
    ]
    if not let_in:
        return with_more(outcome, problems=["no spare was let in"], missing=[])
    before = max(e["generation"] for e in ordered if e["kind"] == "commit" and e["mono"] <= at)
    grown = let_in[0]["generation"]
    smaller = {
        e["step"] for e in ordered if e["kind"] == "commit" and before < e["generation"] < grown
    }
    times = sorted(
        float(e["mono"])
        for e in ordered
        if e["kind"] == "commit" and e["mono"] <= at and e["member"] in trained
        and e["member"] != struck["member"]
    )  # fmt: skip
    promoted_s = round(float(let_in[0]["mono"]) - at, 3)
    problems = list[str]()
    if len(smaller) > SPARE_STEPS:
        problems.append(f"{len(smaller)} steps were committed before the spare was in")
    return with_more(
        outcome,
        problems=problems,
        missing=[],
        promoted_steps=len(smaller),
        promoted_s=promoted_s,
        step_s=_gap_median(times),
    )


def _gap_median(times: Sequence[float]) -> float | None:
    """The median time between two commits of any rank that are not of the same step, roughly."""
    gaps = [b - a for a, b in pairwise(times) if b - a > 1e-3]
    return round(statistics.median(gaps), 4) if gaps else None
