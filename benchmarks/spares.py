"""A hot spare takes a lost rank's place: how long the world is short of one.

A rank kills itself with SIGKILL at a random phase of a random step; a rank that stood by is let in
by the survivors' first vote without the lost one. Of each loss::

    repair_s       until the last survivor had committed its next step, short-handed
    promotion_s    from then until the last member of the whole world had committed its first step:
                   the spare's linking and reading of the state, and a step
    short steps    committed meanwhile by a world that was short of one

One job hosts several kills, one a seat, far enough apart for the next spare to stand by; a kill
that strikes a world that is short of one is not counted. Every job must end with the undisturbed
job's parameters, bit for bit.

    python -m benchmarks.spares [--quick] [--json] [--save]
"""

import argparse
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.faults import follow, median_step, plan_faults, steps_for
from benchmarks.figures import Figure, Report, as_samples, finish, parser, percentile, say
from benchmarks.jobs import Event, Job, JobFailed, params_of, scratch
from benchmarks.series import choose_slot_size
from ftkit.core.fault_plan import Kind

#: Goal, in median steps.
PROMOTION = 2.0

ONE_SPARE = {"spares": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Promotion:
    """One loss, and the spare that made up for it."""

    repair_s: float
    promotion_s: float
    short_steps: int


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print. Returns the exit code."""
    options = _options(argv)
    rng = random.Random(options.seed)
    job = Job(nproc=options.nproc, steps=steps_for(options.nproc, options.gap))
    found, problems = list[Promotion](), list[str]()
    with scratch("spares") as folder:
        if options.step_s:
            job = replace(job, slot_size=choose_slot_size(job, folder, options.step_s))
        reference = job.run(folder / "reference", settings=ONE_SPARE)
        step_s = median_step(reference, size=job.nproc)
        for number in range(2 * -(-options.runs // job.nproc)):
            if len(found) >= options.runs:
                break
            faults = plan_faults(
                rng, [Kind.KILL], nproc=job.nproc, count=job.nproc, gap=options.gap
            )
            events = job.run(folder / f"job-{number}", faults=faults, settings=ONE_SPARE)
            if params_of(events) != params_of(reference):
                problems.append(
                    f"job {number} ended with other parameters than the undisturbed one"
                )
            found += promotions(events, nproc=job.nproc)
            say(f"{len(found)} of {options.runs} losses; the last: {found[-1:]}")
    if not found:
        raise JobFailed(f"no kill struck a whole world; give a larger --gap than {options.gap}")
    return finish(
        report(found, step_s, problems, " ".join(sorted(params_of(reference))), vars(options)),
        options,
    )


def report(
    found: Sequence[Promotion],
    step_s: float,
    problems: Sequence[str],
    params: str,
    options: dict[str, object],
) -> Report:
    """The figures; pure."""

    def figure(name: str, values: Sequence[float], percent: float, goal: float | None) -> Figure:
        unit = "" if "steps" in name else "s"
        value = percentile(values, percent)
        return Figure(name=f"{name} p{percent:g}", value=value, unit=unit, at_most=goal)

    steps = [p.promotion_s / step_s for p in found]
    return Report(
        name="spares",
        figures=[
            Figure(name="median step", value=step_s, unit="s"),
            figure("promotion in median steps", steps, 50, PROMOTION),
            figure("promotion in median steps", steps, 95, None),
            figure("short steps", [float(p.short_steps) for p in found], 100, 1),
            figure("repair_s", [p.repair_s for p in found], 50, None),
            figure("promotion_s", [p.promotion_s for p in found], 50, None),
        ],
        computed={"parameters": params},
        problems=problems,
        options=options,
        samples={"promotions": as_samples(found)},
    )


def promotions(events: Sequence[Event], *, nproc: int) -> list[Promotion]:
    """What the events tell of each loss from a whole world; pure. JobFailed if one never healed."""
    kills = sorted((e for e in events if e["kind"] == "drill"), key=lambda e: float(e["mono"]))
    repairs = follow(events, nproc=nproc)
    ends = [float(e["mono"]) for e in kills[1:]] + [float("inf")]
    found = list[Promotion]()
    for kill, repair, end in zip(kills, repairs, ends, strict=True):
        at = float(kill["mono"])
        after = dict[int, dict[int, list[Event]]]()
        for e in events:
            if e["kind"] == "commit" and at < float(e["mono"]) < end:
                after.setdefault(e["generation"], {}).setdefault(e["member"], []).append(e)
        whole = [
            g
            for g, members in after.items()
            if len(members) == nproc and kill["member"] not in members
        ]
        if not repair.whole:
            continue
        if repair.repair_s is None or not whole:
            raise JobFailed(f"no spare came in after {repair}")
        first = min(whole)
        full_s = max(min(float(e["mono"]) for e in mine) for mine in after[first].values()) - at
        short = {
            e["step"]
            for generation, members in after.items()
            if generation < first and kill["member"] not in members
            for mine in members.values()
            for e in mine
            if float(e["mono"]) - at <= full_s and len(members) < nproc
        }
        found.append(
            Promotion(
                repair_s=repair.repair_s,
                promotion_s=round(full_s - repair.repair_s, 6),
                short_steps=len(short),
            )
        )
    return found


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--runs", type=int, help="losses to count (20; quick: 2)")
    made.add_argument("--nproc", type=int, default=3, help="ranks, without the spare")
    made.add_argument("--gap", type=int, default=200, help="steps between two kills of a job")
    made.add_argument("--seed", type=int, default=0, help="decides seats, phases and moments")
    made.add_argument("--step-s", type=float, default=0.05, help="step wanted; 0: as it comes")
    options = made.parse_args(argv)
    options.runs = options.runs or (2 if options.quick else 20)
    return options


if __name__ == "__main__":
    sys.exit(main())
