"""Two hundred drills of one to three faults each, half on DDP and half on FSDP2.

Drill k is `ftkit drill run mixed --seed SEED+k`: ranks are killed, stopped, hung or made to raise,
in phases and steps that the seed picks, often while the last fault is being repaired, and in one
of four runs the coordinator is killed besides. The drills' checker judges each against one undisturbed
run of the same job. A drill that failed or could not be judged is listed with the command that
does it again, and its events are kept under --runs-dir.

They take an hour: with `--state FILE` a call goes on where the last one ended, and calls for one
series each (`--only`) may share the file.

    python -m benchmarks.mixed_drills --count 200 [--state FILE] [--only DDP] [--quick] [--save]
"""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence

from benchmarks.done_before import DoneBefore
from benchmarks.drills import (
    Judged,
    conditions,
    figures,
    interval,
    run_all,
    samples,
    series_parser,
    unpassed,
)
from benchmarks.figures import Figure, Report, finish
from benchmarks.jobs import python_path, scratch
from ftkit.launch.checker import Answer
from ftkit.launch.drill_job import Job
from ftkit.launch.drill_plan import choose
from ftkit.launch.mixed_drills import MIXED, RANKS_MIN

#: Ranks that a copy of the model is cut over, 0 for none and 1 for all, by the name of the series.
SERIES = {"DDP": 0, "FSDP2": 1}


def main(argv: Sequence[str] | None = None) -> int:
    """Drill and print. Returns the exit code."""
    options = _options(argv)
    # Agents and ranks are processes of their own: they find ftkit where this process did.
    os.environ["PYTHONPATH"] = python_path()
    judged: dict[str, list[Judged]] = {}
    params: dict[str, str] = {}
    for i, name in enumerate(SERIES):
        if options.only not in (None, name):
            continue
        job = Job(
            nproc=options.nproc,
            steps=options.steps,
            max_stall_s=options.max_stall,
            sharded=SERIES[name],
        )
        seeds = range(options.seed + i, options.seed + options.count, len(SERIES))
        drills = [
            choose(MIXED, None, seed=s, nproc=options.nproc, steps=options.steps) for s in seeds
        ]
        with scratch(f"mixed-{name.lower()}") as folder:
            kept = options.runs_dir / name.lower()
            before = DoneBefore(options.state, conditions(options, fault=MIXED, series=name))
            judged[name], params[name] = run_all(drills, job, folder, kept=kept, before=before)
    return finish(report(judged, params, vars(options)), options)


def report(
    judged: Mapping[str, Sequence[Judged]], params: Mapping[str, str], options: Mapping[str, object]
) -> Report:
    """Counts of all drills and of each series; pure."""
    answers = [j.outcome.outcome for each in judged.values() for j in each]
    passed = answers.count(Answer.PASS)
    struck = Counter(
        j.drill.mixed.count for each in judged.values() for j in each if j.drill.mixed is not None
    )
    return Report(
        name="mixed_drills",
        figures=[
            Figure(
                name="passed of all",
                value=passed,
                unit="",
                at_least=len(answers),
                against=interval(passed, len(answers)),
            ),
            *(
                Figure(name=f"drills with {n} fault{'s' * (n > 1)}", value=struck[n], unit="")
                for n in sorted(struck)
            ),
            *(f for name, each in judged.items() for f in figures(each, of=f"{name}: ")),
        ],
        computed={
            f"parameters of the undisturbed run, {name}": digest for name, digest in params.items()
        },
        notes=[
            f"{name}: {line}"
            for name, each in judged.items()
            for line in unpassed(
                each, options, fault=MIXED, more=" --sharded" if SERIES[name] else ""
            )
        ],
        options=dict(options),
        samples={name: samples(each) for name, each in judged.items()},
    )


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    made = series_parser(__doc__, count=200, quick=4, nproc=4, runs_dir="runs/mixed")
    made.add_argument("--only", choices=SERIES, help="do this series only")
    options = made.parse_args(argv)
    if options.count is None:
        options.count = 4 if options.quick else 200
    if options.nproc < RANKS_MIN[MIXED]:
        made.error(f"--nproc is {RANKS_MIN[MIXED]} at least: somebody has to survive")
    return options


if __name__ == "__main__":
    sys.exit(main())
