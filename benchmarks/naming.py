"""Is the right rank named, by the right name, and how soon: crashes, lost nodes, hangs, desync.

Every class of fault is done at least 20 times to real processes, several a job, one after
another, each at a rank and a moment that the seed picks:

    crash     SIGKILL, exit code 1, SIGSEGV, abort()
    oom       allocates up to its address space limit
    node      SIGKILL to a node's agent; its ranks and its shared memory go with it
    stop      SIGSTOP
    hang      sleeps for ever, a loop that does not end, native code that keeps the interpreter,
              a lock that waits for itself
    desync    a collective left out, with another size, or another one in its place

What counts is the first that is said of anybody after the fault, as the event stream has it: the
member it was done to, and a class that fits. A crash is seen when the coordinator says so, from
the moment before the fault; for a hang the goal is the larger of a second and eight steps of the
same job. Naming somebody else is a wrong blame, whether he had to go for it or not; that a node
flaps which was taken away several times is none. What is wrong with a rank again within some
seconds is told as one, so that ranks whose calls differ, and who stay, are struck in turn.

    python -m benchmarks.naming [--quick] [--json] [--save]
"""

import argparse
import math
import random
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from benchmarks.figures import Figure, Report, as_samples, finish, parser, percentile, say
from benchmarks.jobs import Event, Job, scratch
from ftkit.core.fault_plan import DESYNCS, Kind, PlannedFault, Point
from ftkit.core.samples import wilson
from ftkit.core.trace import Trace
from ftkit.core.verdict import ACCUSES_NOBODY, Fault
from ftkit.launch.engine import Engine
from ftkit.launch.event_tail import EventTail
from ftkit.recovery.budget import BudgetConfig

_EXITED = frozenset({Fault.EXITED})
#: Class -> the faults of it, each with the names that fit.
CLASSES: Mapping[str, Mapping[str, frozenset[Fault]]] = {
    "crash": dict.fromkeys((Kind.KILL, Kind.EXIT, Kind.SEGFAULT, Kind.ABORT), _EXITED),
    "oom": {Kind.OOM: frozenset({Fault.OOM})},
    "node": {"lose-node": frozenset({Fault.NODE_LOST})},
    "stop": {Kind.STOP: frozenset({Fault.STOPPED})},
    "hang": {
        Kind.HANG: frozenset({Fault.HANG_BLOCKED}),
        Kind.DEADLOCK: frozenset({Fault.HANG_BLOCKED}),
        Kind.SPIN: frozenset({Fault.HANG_BUSY}),
        Kind.GIL_HANG: frozenset({Fault.HANG_BUSY}),
    },
    "desync": dict.fromkeys(sorted(DESYNCS), frozenset({Fault.DESYNC})),
}
#: About the work, or the host that others keep busy: none of these is a word about a fault done here.
_LABELS = (ACCUSES_NOBODY | {Fault.STARVED}) - {Fault.STALL}
#: Classes in which the rank stays and only stands still.
HANGS = ("stop", "hang")
FITS = {fault: fits for kinds in CLASSES.values() for fault, fits in kinds.items()}

#: Steps before the first fault, so that the job has a tempo.
FIRST = 40
NPROC = 3
CRASH_SEEN_S = 0.050
HANG_STEPS = 8
RIGHT_MIN, WRONG_MAX = 0.99, 0.01
#: Points at which a training thread of the job surely is once a step.
POINTS = (Point.DATA, Point.FORWARD, Point.BACKWARD, Point.OPTIMIZER)


@dataclass(frozen=True, slots=True, kw_only=True)
class Named:
    """One fault, and what was said first after it."""

    group: str
    fault: str
    member: int
    said: str | None
    """The class; None: nothing was said before the next fault, or the end."""
    of: int | None
    after_s: float | None
    reason: str
    step_s: float
    """Median step of the job before the fault."""
    blamed: int
    """Others who were accused of something; a label accuses nobody."""

    @property
    def right(self) -> bool:
        return self.of == self.member and self.said in FITS[self.fault]


def main(argv: Sequence[str] | None = None) -> int:
    """Do all faults and print. Returns the exit code."""
    options = _options(argv)
    rng = random.Random(options.seed)
    found, problems = list[Named](), list[str]()
    with scratch("naming") as folder:
        for group in options.classes:
            tries = 0
            while (left := options.runs - _count(found, group)) > 0 and tries < 4:
                many = min(left, options.faults_a_job)
                run = run_nodes if group == "node" else run_faults
                named = run(group, many, rng, folder / f"{group}-{tries}", options)
                found += named
                tries += 1
                say(f"{group}: {_count(found, group)} of {options.runs}")
            if left > 0:
                problems.append(f"{group}: only {options.runs - left} of {options.runs} struck")
    return finish(report(found, problems, vars(options)), options)


def run_faults(
    group: str, many: int, rng: random.Random, folder: Path, options: argparse.Namespace
) -> list[Named]:
    """One job with `many` faults of ranks. Blocks.

    Members are numbered in the order in which they are started, so who will sit where after
    each fault is known beforehand; should one more be replaced, later faults do not strike.
    """
    faults, seats, next_member = list[PlannedFault](), list(range(NPROC)), NPROC
    kinds = [Kind(k) for k in CLASSES[group]]
    gap = options.gap * (2 if group == "desync" else 1)
    for i in range(many):
        kind = kinds[i % len(kinds)]
        last = faults[-1].seat if faults and kind in DESYNCS else None
        seat = rng.choice([s for s in range(NPROC) if s != last])
        fault = PlannedFault(
            kind=kind,
            point=Point.BACKWARD if kind in DESYNCS else rng.choice(POINTS),
            seat=seat,
            member=seats[seat],
            step=FIRST + i * gap + rng.randrange(10),
            bucket=rng.randrange(3) if kind in DESYNCS else 0,
            delay_s=rng.uniform(0, 0.004),
        )
        faults.append(fault)
        if kind not in DESYNCS:
            seats[seat], next_member = next_member, next_member + 1
    job = _job(options, steps=FIRST + many * gap + 20)
    return follow(group, job.run(folder, faults=faults))


def run_nodes(
    group: str, many: int, rng: random.Random, folder: Path, options: argparse.Namespace
) -> list[Named]:
    """One job of three nodes that loses `many`, one after another. Blocks."""
    steps = FIRST + many * options.gap + 60
    job = replace(_job(options, steps=steps), nproc=1)
    killer = NodeKiller(folder, rng, many, options.gap)
    return follow(group, job.run(folder, on_poll=killer.poll, settings={"nodes": NPROC}))


class NodeKiller:
    """Kills a node's agent every `gap` steps, once all seats have trained for a while.

    A process that is lost before it has played some steps is taken to be unable to, three times.
    """

    def __init__(self, folder: Path, rng: random.Random, many: int, gap: int) -> None:
        self._folder, self._rng, self._left, self._gap = folder, rng, many, gap
        self._tail = EventTail(folder)
        self._next = FIRST
        self._members: dict[int, int] = {}
        self._at: dict[int, int] = {}
        self._first: dict[int, int] = {}

    def poll(self, engine: Engine) -> None:
        """Strike when it is time. Called while the job runs."""
        for event in self._tail.poll():
            if event["kind"] == "commit":
                if self._members.get(event["seat"]) != event["member"]:
                    self._first[event["seat"]] = event["step"]
                self._members[event["seat"]] = event["member"]
                self._at[event["seat"]] = event["step"]
        played = [step - self._first[seat] for seat, step in self._at.items()]
        if not self._left or len(played) < NPROC or min(played) < 2 * BudgetConfig().progress_steps:
            return
        if min(self._at.values()) < self._next:
            return
        node = self._rng.randrange(NPROC)
        with Trace(self._folder / "events" / f"drill-{self._left}.jsonl") as trace:
            trace.event(
                "drill", fault="lose-node", phase="any", seat=node, member=self._members[node]
            )
        engine.kill_node(node)
        self._left -= 1
        self._next = max(self._at.values()) + self._gap
        self._at.pop(node)


def follow(group: str, events: Sequence[Event]) -> list[Named]:
    """What was said of each fault of a job; pure."""
    found = list[Named]()
    strikes = [e for e in events if e["kind"] == "drill"]
    ends = [float(e["mono"]) for e in strikes[1:]] + [math.inf]
    said = [e for e in events if e["kind"] in ("suspicion", "verdict")]
    struck = set[int]()
    for strike, until in zip(strikes, ends, strict=True):
        at, member = float(strike["mono"]), int(strike["member"])
        struck.add(int(strike.get("seat", -1)))
        told = [
            e
            for e in said
            if at <= e["mono"] < until
            and not (e["fault"] == Fault.FLAPPING and e.get("seat") in struck)
        ]
        first = next((e for e in told if e["fault"] in frozenset(Fault) - _LABELS), None)
        found.append(
            Named(
                group=group,
                fault=str(strike["fault"]),
                member=member,
                said=None if first is None else str(first["fault"]),
                of=None if first is None else int(first["member"]),
                after_s=None if first is None else round(first["mono"] - at, 4),
                reason="" if first is None else str(first["reason"])[:300],
                step_s=_step_s(events, before=at),
                blamed=len(
                    {e["member"] for e in told if e["fault"] not in ACCUSES_NOBODY | _LABELS}
                    - {member}
                ),
            )
        )
    return found


def _step_s(events: Sequence[Event], *, before: float) -> float:
    """The median of the last steps of any one rank."""
    times = [
        (e["seat"], float(e["mono"]))
        for e in events
        if e["kind"] == "commit" and e["mono"] < before
    ]
    gaps = [
        b - a
        for seat in {seat for seat, _ in times}
        for a, b in pairwise([at for s, at in times if s == seat][-30:])
    ]
    return round(statistics.median(gaps), 4) if gaps else 0.0


def report(found: Sequence[Named], problems: Sequence[str], options: dict[str, object]) -> Report:
    """The figures of all faults; pure."""
    figures = list[Figure]()
    for group in CLASSES:
        mine = [n for n in found if n.group == group]
        if not mine:
            continue
        right = sum(n.right for n in mine)
        low, high = wilson(right, len(mine))
        figures.append(
            Figure(
                name=f"{group}: right class and rank",
                value=right / len(mine),
                unit="",
                at_least=RIGHT_MIN,
                against=f"{right} of {len(mine)}, 95 % interval {low:.3f} to {high:.3f}",
            )
        )
    blamed = sum(n.blamed > 0 for n in found)
    low, high = wilson(blamed, len(found))
    figures.append(
        Figure(
            name="wrong blame",
            value=blamed / len(found) if found else None,
            unit="",
            at_most=WRONG_MAX,
            against=f"{blamed} of {len(found)}, 95 % interval {low:.3f} to {high:.3f}",
        )
    )
    crashes = _times(n for n in found if n.group == "crash")
    figures += [
        Figure(name="crash seen p50", value=percentile(crashes, 50), unit="s"),
        Figure(
            name="crash seen p99",
            value=percentile(crashes, 99),
            unit="s",
            at_most=CRASH_SEEN_S,
            against="NVRx looks every 5 s, torchrun every 0.1 s",
        ),
    ]
    hangs = [n for n in found if n.group in HANGS and n.after_s is not None]
    late = [n.after_s / max(1.0, HANG_STEPS * n.step_s) for n in hangs if n.after_s is not None]
    figures += [
        Figure(name="hang named p50", value=percentile(_times(hangs), 50), unit="s"),
        Figure(
            name="hang named p99",
            value=percentile(_times(hangs), 99),
            unit="s",
            against="torch 10 to 30 min, DLRover 5 min, NVRx 60 to 90 s",
        ),
        Figure(
            name="hang named p99, of the larger of 1 s and 8 steps",
            value=percentile(late, 99),
            unit="",
            at_most=1.0,
        ),
    ]
    for group in ("oom", "node", "desync"):
        times = _times(n for n in found if n.group == group)
        figures.append(Figure(name=f"{group} named p99", value=percentile(times, 99), unit="s"))
    return Report(
        name="naming",
        figures=figures,
        computed={},
        problems=problems,
        notes=[
            f"{n.fault} of member {n.member} was called {n.said} of member {n.of}: {n.reason}"
            for n in found
            if not n.right
        ],
        options=options,
        samples=as_samples(found),
    )


def _times(found: Iterable[Named]) -> list[float]:
    return [n.after_s for n in found if n.after_s is not None]


def _count(found: Sequence[Named], group: str) -> int:
    return sum(n.group == group for n in found)


def _job(options: argparse.Namespace, *, steps: int) -> Job:
    return Job(nproc=NPROC, steps=steps, max_stall_s=options.max_stall, slots=6)


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--runs", type=int, help="faults of each class (20; quick: 3)")
    made.add_argument("--classes", nargs="+", choices=list(CLASSES), default=list(CLASSES))
    made.add_argument("--max-stall", type=float, default=2.5, help="max_stall_s of the jobs")
    made.add_argument("--gap", type=int, default=60, help="steps between two faults of a job")
    made.add_argument("--faults-a-job", type=int, default=20, help="at most")
    made.add_argument("--seed", type=int, default=0, help="decides seats, points and moments")
    options = made.parse_args(argv)
    if options.runs is None:
        options.runs = 3 if options.quick else 20
    return options


if __name__ == "__main__":
    began = time.monotonic()
    code = main()
    say(f"took {time.monotonic() - began:.0f} s")
    sys.exit(code)
