"""Slots of the global batch: how they are divided among ranks, and which are played again.

Four ranks train the bundled job; each sleeps for each slot, as if a device computed, so that ranks do
not share the cores of this machine. ::

    slow rank       one rank takes twice as long: the step rate with slots divided by speed, against an
                    even division
    three of four   one rank is lost: the step rate until it is back, against 3/4 of the full rate
    salvage         one rank is lost in the backward pass of its last slot: slots that are played again,
                    against the lost rank's. What peers that begin the step anew would play: all

Every job must end with the parameters of the undisturbed one.

    python -m benchmarks.shares [--quick] [--json] [--save]
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from benchmarks.figures import Figure, Report, finish, parser, say
from benchmarks.jobs import Event, Job, JobFailed, params_of, scratch
from ftkit.collectives.slots import assign
from ftkit.core import pace_plan
from ftkit.core.fault_plan import Kind, PlannedFault, Point
from ftkit.core.pace_plan import PaceFault, PacePlan

RANKS, SLOTS, LOST = 4, 24, 3
SLOW = 2.0
FASTER, OF_THREE_QUARTERS, AGAIN = 1.3, 0.95, 1.0


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print. Returns the exit code."""
    options = _options(argv)
    words = ("--width", "32", "--context", "16", "--device-s", str(options.device_s), "--rebalance")
    job = Job(nproc=RANKS, steps=options.steps, slots=SLOTS, model=words)
    even = Job(nproc=RANKS, steps=options.steps, slots=SLOTS, model=words[:-1])
    slow = PacePlan(fault=PaceFault.STEADY, member=LOST, step=1, factor=SLOW)
    with scratch("shares") as folder:
        full = job.run(folder / "full")
        params = params_of(full)
        problems = list[str]()
        unbalanced = even.run(folder / "even", settings={"env": pace_plan.to_environ(slow)})
        balanced = job.run(folder / "balanced", settings={"env": pace_plan.to_environ(slow)})
        losses = [_lose(job, folder / f"loss-{run}", run) for run in range(options.runs)]
    for name, events in (
        ("even", unbalanced),
        ("balanced", balanced),
        *(("loss", e) for e in losses),
    ):
        if params_of(events) != params:
            problems.append(f"{name}: other parameters than the undisturbed run's")
    full_s = pace(full)
    three_s = statistics.median(short_handed(e) for e in losses)
    again = [played_again(e) for e in losses]
    say(f"steps: full {full_s:.3f} s, three ranks {three_s:.3f} s; played again {again}")
    counts = [e["counts"] for e in balanced if e["kind"] == "rebalance"]
    figures = [
        Figure(
            name="slow rank: rate, by speed / even",
            value=pace(unbalanced) / pace(balanced),
            unit="",
            at_least=FASTER,
            against=f"an even division: {pace(unbalanced):.3g} s a step",
        ),
        Figure(
            name="three of four: rate / (3/4 of the full one)",
            value=full_s / three_s / (1 - 1 / RANKS),
            unit="",
            at_least=OF_THREE_QUARTERS,
        ),
        Figure(
            name="slots played again / the lost rank's",
            value=statistics.median(again) / len(assign(SLOTS, RANKS)[LOST]),
            unit="",
            at_most=AGAIN,
            against=f"the whole step: {SLOTS / len(assign(SLOTS, RANKS)[LOST]):.3g}",
        ),
    ]
    report = Report(
        name="shares",
        figures=figures,
        computed={"parameters": " ".join(sorted(params)), "counts": str(counts[-1:])},
        problems=problems,
        notes=["the rank that is lost comes back within seconds; its steps are those until then"],
        options=vars(options),
        samples={"played_again": again},
    )
    return finish(report, options)


def _lose(job: Job, folder: Path, run: int) -> list[Event]:
    struck = PlannedFault(
        kind=Kind.KILL, point=Point.BACKWARD, seat=LOST, member=LOST, step=job.steps // 3 + run,
        bucket=0, delay_s=0.0, byte=0,
    )  # fmt: skip
    return job.run(folder, faults=[struck])


def pace(events: Sequence[Event]) -> float:
    """Median seconds from commit to commit of rank 0, in the second half of a job; pure."""
    times = [float(e["mono"]) for e in events if e["kind"] == "commit" and e["seat"] == 0]
    times = sorted(times)[len(times) // 2 :]
    return statistics.median(b - a for a, b in pairwise(times))


def short_handed(events: Sequence[Event]) -> float:
    """The same in the world without the lost rank. JobFailed when it lasted too short."""
    worlds = sorted({int(e["generation"]) for e in events if e["kind"] == "commit"})
    smaller = worlds[1]
    times = sorted(
        float(e["mono"])
        for e in events
        if e["kind"] == "commit" and e["seat"] == 0 and e["generation"] == smaller
    )
    if len(times) < 3:
        raise JobFailed(f"only {len(times)} steps were made without the lost rank")
    return statistics.median(b - a for a, b in pairwise(times))


def played_again(events: Sequence[Event]) -> int:
    """Slots of the lost rank, and those that others had summed and play anew nevertheless; pure."""
    struck = next(e for e in events if e["kind"] == "drill")
    summed = {
        (e["member"], slot)
        for e in events
        if e["kind"] == "rollback" and e["step"] == struck["step"]
        for slot in e["summed"]
    }
    votes = [e for e in events if e["kind"] == "vote" and e["step"] == struck["step"]]
    kept = {
        (e["member"], slot)
        for e in events
        if e["kind"] == "salvage" and e["step"] == struck["step"]
        for slot in e["kept"]
    }
    if not votes:
        raise JobFailed("the step was never voted on")
    return len(assign(SLOTS, RANKS)[LOST]) + len(summed - kept)


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--runs", type=int, help="losses (5; quick: 1)")
    made.add_argument("--steps", type=int, default=36, help="of each job")
    made.add_argument("--device-s", type=float, default=0.03, help="slept for each slot")
    options = made.parse_args(argv)
    options.runs = options.runs or (1 if options.quick else 5)
    return options


if __name__ == "__main__":
    sys.exit(main())
