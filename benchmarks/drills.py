"""A hundred drills at random phases: what is lost, what is doubled, who leaves, which bits.

Drill k is `choose("all", None, seed=seed + k)`: one rank is killed, stopped, hung or made to
raise, or the coordinator is killed, in a phase of a step that the seed picks (in recovery
too). The drills' checker judges each one against one undisturbed run of the same job. A drill
that failed or could not be judged is listed with the command that does it again, and its
events are kept under --runs-dir.

    python -m benchmarks.drills --count 100 [--state FILE] [--quick] [--json] [--save]
"""

import argparse
import dataclasses
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.done_before import DoneBefore
from benchmarks.figures import Figure, Report, finish, parser, say
from benchmarks.jobs import JobFailed, params_of, python_path, scratch
from ftkit.core.samples import wilson
from ftkit.launch.checker import Answer, Outcome
from ftkit.launch.drill_job import Job
from ftkit.launch.drill_plan import Drill, choose
from ftkit.launch.drills import run_drill
from ftkit.launch.engine import Engine

#: A drill takes under half a minute on a quiet machine: one that takes this long stands still.
LIMIT_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """One drill and its outcome."""

    drill: Drill
    outcome: Outcome


def main(argv: Sequence[str] | None = None) -> int:
    """Drill and print. Returns the exit code."""
    options = _options(argv)
    # Agents and ranks are processes of their own: they find ftkit where this process did.
    os.environ["PYTHONPATH"] = python_path()
    job = Job(nproc=options.nproc, steps=options.steps, max_stall_s=options.max_stall)
    drills = [
        choose("all", None, seed=options.seed + k, nproc=job.nproc, steps=job.steps)
        for k in range(options.count)
    ]
    with scratch("drills") as folder:
        before = DoneBefore(options.state, conditions(options, fault="all"))
        judged, params = run_all(drills, job, folder, kept=options.runs_dir, before=before)
    return finish(report(judged, params, vars(options)), options)


def run_all(
    drills: Sequence[Drill],
    job: Job,
    folder: Path,
    *,
    kept: Path,
    before: DoneBefore | None = None,
) -> tuple[list[Judged], str]:
    """Do all drills. Blocks. Returns them with the undisturbed run's digest of parameters.

    Args:
      drills: what to do.
      job: to which job.
      folder: a folder for the runs, each removed when its drill has passed.
      kept: where runs that did not pass are moved to.
      before: drills of the same job that are not done again; None for none.
    """
    before = before or DoneBefore(None, {})
    known = {d["seed"]: _outcome(d) for d in before.records}
    stop, reference = job.run(folder / "reference")
    if stop.code:
        raise JobFailed(f"the undisturbed run failed: {stop.reason}")
    (params,) = params_of(reference)
    judged = list[Judged]()
    for drill in drills:
        if drill.seed in known:
            judged.append(Judged(drill=drill, outcome=known[drill.seed]))
            continue
        run_dir = folder / f"{drill.fault}-{drill.seed}"
        limit = _Limit(LIMIT_S)
        outcome, _ = run_drill(drill, job, reference, run_dir, on_poll=limit.poll)
        judged.append(Judged(drill=drill, outcome=outcome))
        before.add(_brief(outcome))
        if outcome.outcome is Answer.PASS:
            shutil.rmtree(run_dir)
        else:
            kept.mkdir(parents=True, exist_ok=True)
            shutil.move(run_dir, kept / run_dir.name)
        answers = Counter(j.outcome.outcome.value for j in judged)
        say(f"{len(judged)} of {len(drills)}: {dict(answers)}; {drill.fault} at {drill.where}")
    return judged, params


class _Limit:
    """Ends a job that stands still, so that its drill fails and the series goes on."""

    def __init__(self, seconds: float) -> None:
        self._until = time.monotonic() + seconds

    def poll(self, engine: Engine) -> None:
        """Called while the job runs."""
        if time.monotonic() > self._until:
            engine.interrupt()  # asked again, it is the same


def report(judged: Sequence[Judged], params: str, options: dict[str, object]) -> Report:
    """Counts over all drills; pure."""
    return Report(
        name="drills",
        figures=figures(judged),
        computed={"parameters of the undisturbed run": params},
        notes=unpassed(judged, options),
        options=options,
        samples=samples(judged),
    )


def figures(judged: Sequence[Judged], *, of: str = "") -> list[Figure]:
    """What was counted over all drills, each figure named with `of` before it."""
    outcomes = [j.outcome for j in judged]
    answers = Counter(o.outcome for o in outcomes)
    equal = sum(o.params_equal is True for o in outcomes)
    count = len(outcomes)
    zero = {
        "failed": answers[Answer.FAIL],
        "not judged (unknown)": answers[Answer.UNKNOWN],
        "survivors that left": sum(o.survivor_exits for o in outcomes),
        "samples lost": sum(o.samples_lost for o in outcomes),
        "samples doubled": sum(o.samples_doubled for o in outcomes),
        "steps undone": sum(o.steps_lost for o in outcomes),
        "without equal parameters": count - equal,
    }
    # Those that say of a drill whether, not how much.
    against = {
        "failed": interval(answers[Answer.FAIL], count),
        "without equal parameters": interval(count - equal, count),
        "survivors that left": "torchft: survivors crash in 5 of 6 random kills",
    }
    return [
        Figure(name=f"{of}drills", value=count, unit=""),
        Figure(
            name=f"{of}passed",
            value=answers[Answer.PASS],
            unit="",
            against=interval(answers[Answer.PASS], count),
        ),
        *(
            Figure(name=of + name, value=n, unit="", at_most=0, against=against.get(name, ""))
            for name, n in zero.items()
        ),
    ]


def interval(hits: int, count: int) -> str:
    """What `hits` of `count` say of how often it happens: the share and Wilson's interval of 95 %."""
    if not count:
        return ""
    low, high = wilson(hits, count)
    return f"{hits / count:.1%} of {count}, 95 % in [{low:.1%}, {high:.1%}]"


def unpassed(
    judged: Sequence[Judged], options: Mapping[str, object], *, fault: str = "all", more: str = ""
) -> list[str]:
    """A line for each drill that failed or could not be judged, with what does it again."""
    return [
        f"{j.outcome.outcome.value}: {replay(j.drill, options, fault=fault)}{more} "
        f"({j.drill.fault} at {j.drill.where}, step {j.drill.step}: {_why(j.outcome)})"
        for j in judged
        if j.outcome.outcome is not Answer.PASS
    ]


def samples(judged: Sequence[Judged]) -> list[dict[str, object]]:
    """Every drill and its outcome, JSON-safe."""
    return [
        dataclasses.asdict(j.drill) | {"where": j.drill.where} | _brief(j.outcome) for j in judged
    ]


def replay(drill: Drill, options: Mapping[str, object], *, fault: str = "all") -> str:
    """The command that does one drill of the series again."""
    return (
        f"ftkit drill run {fault} --seed {drill.seed} --nproc {options['nproc']} "
        f"--steps {options['steps']} --max-stall {options['max_stall']:g}"
    )


def _brief(outcome: Outcome) -> dict[str, object]:
    found = outcome.to_json()
    evidence = outcome.evidence
    found["evidence"] = {k: evidence.get(k) for k in ("problems", "missing")}
    return found


def _outcome(brief: Mapping[str, Any]) -> Outcome:
    """What `_brief` made JSON of."""
    return Outcome(**{**brief, "outcome": Answer(brief["outcome"])})


def _why(outcome: Outcome) -> str:
    said = outcome.evidence.get("problems") or outcome.evidence.get("missing")
    return "; ".join(map(str, said)) if isinstance(said, list) else str(said)


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    made = series_parser(__doc__, count=100, quick=5, nproc=3, runs_dir="runs/drills")
    options = made.parse_args(argv)
    if options.count is None:
        options.count = 5 if options.quick else 100
    return options


def conditions(options: argparse.Namespace, **more: object) -> dict[str, object]:
    """What has to be the same for a drill to count as done before, beside its seed."""
    return {"nproc": options.nproc, "steps": options.steps, "max_stall": options.max_stall, **more}


def series_parser(
    doc: str | None, *, count: int, quick: int, nproc: int, runs_dir: str
) -> argparse.ArgumentParser:
    """The options of a benchmark that does drills in series; `--count` stays None unless given."""
    made = parser(doc)
    made.add_argument("--count", type=int, help=f"drills ({count}; quick: {quick})")
    made.add_argument("--seed", type=int, default=0, help="seed of the first drill")
    made.add_argument("--nproc", type=int, default=nproc, help="ranks of the job")
    made.add_argument("--steps", type=int, default=150, help="steps of the job")
    made.add_argument("--max-stall", type=float, default=5.0, help="max_stall_s of the job")
    made.add_argument("--state", type=Path, help="a file that keeps what was done, to go on with")
    made.add_argument(
        "--runs-dir", type=Path, default=Path(runs_dir), help="keeps what did not pass"
    )
    return made


if __name__ == "__main__":
    sys.exit(main())
