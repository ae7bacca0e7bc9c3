"""What `ftkit drill run` and `ftkit drill demo` do: series of drills, shown and summed up."""

import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from ftkit.core.errors import FtkitError, UsageError
from ftkit.core.fault_plan import Kind, Point
from ftkit.launch import detector_drills, pace_drills, resource_drills
from ftkit.launch.checker import Answer, Outcome
from ftkit.launch.clean_drill import CLEAN
from ftkit.launch.config import new_job_id
from ftkit.launch.drill_catalogue import (
    CHURN,
    FLAP,
    JOIN,
    NODE_FAULTS,
    PARTITION_HALF,
    SHRINK_GROW,
    SPARE,
    STAGE_LOST,
    TWO_AT_ONCE,
)
from ftkit.launch.drill_faults import PREEMPT
from ftkit.launch.drill_job import Job
from ftkit.launch.drill_plan import Drill, choose, choose_nodes
from ftkit.launch.drills import run_drill
from ftkit.launch.live import summary, watch
from ftkit.launch.report import write_report
from ftkit.launch.run_folder import RUNS

#: Exit codes by the worst answer of a series.
CODES = {Answer.PASS: 0, Answer.FAIL: 1, Answer.UNKNOWN: 2}

#: Drills in which a step is to take a certain time.
PACED = frozenset(
    {*pace_drills.CATALOGUE, *detector_drills.CATALOGUE, resource_drills.LEAK, TWO_AT_ONCE, CLEAN}
)

#: Drills in which a step is to take longer while a seat is empty.
SHORT_HANDED = (FLAP, JOIN, CHURN, PREEMPT, SHRINK_GROW, PARTITION_HALF)

#: Fewer, and the demo's job may end before the lost rank is back. The fault strikes in the first
#: fifth, and starting Python and torch beside ranks that train took from 60 steps to 120, on a
#: machine of two cores that did other things too.
DEMO_STEPS_MIN = 200


def run_drills(
    fault: str,
    *,
    at: str | None,
    count: int,
    seed: int,
    as_json: bool,
    run_dir: Path | None,
    **job_options: Any,
) -> int:
    """Run `count` drills, with the seeds from `seed` on. Returns the exit code."""
    job = Job(**job_options)
    seeds = range(seed, seed + count)
    if fault == PARTITION_HALF and job.sharded and not job.parity:
        raise UsageError(
            f"{fault} takes half of a sharded job's state out of reach, and the job would end for it: "
            "give --parity k+m with m of half the nodes"
        )
    if fault in NODE_FAULTS:
        job = job.for_nodes(fault)
        drills = [choose_nodes(fault, job, at=at, seed=s) for s in seeds]
    else:
        job = job.for_members() if fault in SHORT_HANDED else job
        job = replace(job.for_pace(SPARE), spares=1) if fault == SPARE else job
        job = job.for_stages() if fault == STAGE_LOST else job
        drills = [choose(fault, at, seed=s, nproc=job.world_size, steps=job.steps) for s in seeds]
    if job.sharded > job.world_size:
        raise UsageError(
            f"--sharded {job.sharded} cuts a copy of the model over more ranks than the job's "
            f"{job.world_size}: give fewer, or --sharded alone for all of them"
        )
    root = _folder(run_dir or RUNS / f"drill-{new_job_id()}")
    console = Console(stderr=as_json)
    # What a step takes is no part of the outcome.
    reference = _undisturbed(job, root / "reference", console, quiet=as_json)
    job = job.for_pace(fault) if fault in PACED else job
    answers: Counter[Answer] = Counter()
    results = []
    for drill in drills:
        folder = root / f"{drill.fault}-{drill.seed}"
        title = f"{drill.fault} at {drill.where}"
        with _shown(folder, console, job.steps, title, quiet=as_json or count > 1):
            outcome, _ = run_drill(drill, job, reference, folder)
        answers[outcome.outcome] += 1
        results.append(outcome.to_json())
        if count > 1:
            console.print(_line(outcome, drill))
        elif not as_json:
            console.print(summary(outcome))
    if as_json:
        both = {"drills": results, **{a.value: answers[a] for a in Answer}}
        print(json.dumps(results[0] if count == 1 else both), flush=True)
    elif count > 1:
        console.print(", ".join(f"{n} {a}" for a, n in answers.items()) + f"; runs in {root}")
    return max(CODES[a] for a in answers)


def run_demo(*, data: Path | None, report: Path, seed: int, as_json: bool, **given: Any) -> int:
    """The main job: lose one rank in the middle of a step, and show that nothing was lost.

    The seed decides the job's parameters and samples, and who is lost at which step.

    Raises:
      UsageError: the job is too short for the lost rank to come back.
    """
    run_dir = given.pop("run_dir")
    job, drill = demo(seed=seed, data=data, **given)
    if report.is_dir() or not report.absolute().parent.is_dir():
        raise UsageError(f"--report {report} cannot be written: give a file in a folder there is")
    root = _folder(run_dir or RUNS / f"demo-{new_job_id()}")
    console = Console(stderr=as_json)
    reference = _undisturbed(job, root / "reference", console, quiet=as_json)
    title = f"the same, with rank {drill.seat} killed in step {drill.step}"
    with _shown(root / "disturbed", console, job.steps, title, quiet=as_json):
        outcome, events = run_drill(drill, job, reference, root / "disturbed")
    write_report(report, events, reference, outcome)
    if as_json:
        print(json.dumps(outcome.to_json() | {"report": str(report)}), flush=True)
    else:
        console.print(summary(outcome))
        console.print(f"report: {report}    events: {root}", highlight=False)
    return CODES[outcome.outcome]


def demo(*, seed: int, data: Path | None, **given: Any) -> tuple[Job, Drill]:
    """The demo's job and drill, as the command line asks for them; pure."""
    # A script of the user's has its own seed and its own length.
    bundled = given["script"] is None
    if bundled and given["steps"] < DEMO_STEPS_MIN:
        raise UsageError(
            f"the demo needs --steps {DEMO_STEPS_MIN} or more, got {given['steps']}: in fewer the "
            "lost rank would not be back before the end"
        )
    job = Job(**given, data=data, workload=("--seed", str(seed)) if bundled else ())
    phase = Point.ALL_REDUCE.value
    return job, choose(Kind.KILL.value, phase, seed=seed, nproc=job.world_size, steps=job.steps)


def _folder(run_dir: Path) -> Path:
    """The folder of a series of drills, made. UsageError where it cannot be."""
    root = run_dir.resolve()
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--run-dir {run_dir} cannot be made: {error.strerror}") from error
    return root


def _undisturbed(job: Job, run_dir: Path, console: Console, *, quiet: bool) -> list[dict[str, Any]]:
    """The events of the run that drills are compared with. FtkitError when it fails."""
    with _shown(run_dir, console, job.steps, "undisturbed run", quiet=quiet):
        stop, events = job.run(run_dir)
    if stop.code:
        raise FtkitError(f"the undisturbed run failed: {stop.reason}")
    return events


def _line(outcome: Outcome, drill: Drill) -> str:
    repair = "     -" if outcome.repair_s is None else f"{outcome.repair_s * 1e3:6.0f}"
    line = f"{outcome.outcome:8} seed {drill.seed:<5} {drill.fault:16} {drill.where:13} {repair} ms"
    broken = outcome.evidence.get("problems") or outcome.evidence.get("missing")
    return f"{line}  {broken}" if outcome.outcome is not Answer.PASS else line


@contextmanager
def _shown(
    run_dir: Path, console: Console, steps: int, title: str, *, quiet: bool
) -> Iterator[None]:
    """Show a run live while the body runs it."""
    if quiet:
        yield
        return
    (run_dir / "events").mkdir(parents=True, exist_ok=True)
    stop = threading.Event()
    viewer = threading.Thread(
        target=watch,
        args=(run_dir,),
        kwargs={"stop": stop, "steps": steps, "title": title, "console": console},
        name="ftkit-live",
        daemon=True,
    )
    viewer.start()
    try:
        yield
    finally:
        stop.set()
        viewer.join()
