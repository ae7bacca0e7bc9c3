"""DDP through many kills: each SIGKILL strikes a rank at a byte of an all-reduce.

Jobs of the bundled training script run one after another; in each, rank after rank is killed
in the middle of the reduction of a bucket of gradients, at a step, a bucket and a byte that the
seed chose, and its replacement is in turn. A job counts when it ended by itself, no rank but
those that were killed left with an error (so no exception reached the script), and every rank
ended with the parameters of an undisturbed run, bit for bit.

A thousand kills take hours, so what was done is kept: with `--state FILE` a series goes on where
it stood, and the figures are those of all its jobs.

    python -m benchmarks.kills --kills 1000 --state kills.jsonl [--json] [--save]
"""

import argparse
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchmarks.done_before import DoneBefore
from benchmarks.figures import Figure, Report, finish, parser, percentile, say
from benchmarks.jobs import ROOT, Event, params_of, scratch
from ftkit.core.fault_plan import Kind, PlannedFault, Point
from ftkit.launch.drill_catalogue import BUCKETS
from ftkit.launch.drill_job import Job
from ftkit.launch.report_history import read_history
from ftkit.launch.report_incidents import read_incidents, targets_of

#: The first steps are not struck: DDP and the snapshots are being set up.
FIRST = 15
#: Steps after the last kill, in which all come back.
LAST = 60
#: What a step takes longer while a seat is empty.
SHORT_HANDED_S = 0.03


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """One job of the series."""

    seed: int
    kills: int
    """Those that struck."""
    seconds: float
    repairs_s: list[float]
    """From each kill to the moment when all survivors had committed again."""
    problems: list[str]


def main(argv: Sequence[str] | None = None) -> int:
    """Go on with the series and print where it stands. Returns the exit code."""
    options = _options(argv)
    same = {k: getattr(options, k) for k in ("a_job", "gap", "nproc", "seed")}
    before = DoneBefore(options.state, same)
    done = [Done(**record) for record in before.records]
    job = Job(
        nproc=options.nproc,
        steps=FIRST + options.a_job * options.gap + LAST,
        slots=12,
        slot_size=1,
        workload=("--short-handed-s", str(SHORT_HANDED_S)),
    )
    with scratch("kills") as folder:
        params = _undisturbed(job, folder / "reference")
        while (so_far := sum(d.kills for d in done)) < options.kills:
            seed = options.seed + len(done)
            done.append(_one(job, options, seed, params, folder / f"job-{seed}"))
            before.add(asdict(done[-1]))
            say(f"{so_far + done[-1].kills} of {options.kills} kills; {done[-1].problems or 'ok'}")
            if done[-1].kills == 0:
                break  # nothing strikes: more jobs would not help
    return finish(report(done, params, vars(options)), options)


def plan(rng: random.Random, *, nproc: int, kills: int, gap: int) -> list[PlannedFault]:
    """Kill after kill, `gap` steps apart: each strikes the rank that has lived longest; pure.

    Members are numbered as they come, so the one that replaces member m is m + nproc as long as
    they come back in the order in which they were lost, and it has had nproc - 1 gaps for that.
    """
    return [
        PlannedFault(
            kind=Kind.KILL,
            point=Point.IN_COLLECTIVE,
            seat=member % nproc,
            member=member,
            step=FIRST + member * gap + rng.randrange(gap // 2),
            bucket=rng.randrange(BUCKETS),
            byte=rng.randrange(1 << 24),
        )
        for member in range(kills)
    ]


def judge(events: Sequence[Event], params: str, *, nproc: int) -> Done:
    """What one job's events say; pure. Its seed and its duration are the caller's to fill in."""
    history = read_history(events)
    problems = list[str]()
    if history.end_outcome != "completed":
        problems.append(f"the job ended as {history.end_outcome!r}")
    finals = [e for e in events if e["kind"] == "final"]
    if {e["seat"] for e in finals} != set(range(nproc)) or params_of(events) != {params}:
        problems.append(f"{len(finals)} ranks ended with {sorted(params_of(events))}, not {params}")
    targets = targets_of(history)
    end = float("inf") if history.ended is None else history.ended
    problems += [
        f"member {e.member}, which nobody killed, left with code {e.code}, signal {e.signal}"
        for e in history.exits
        if not e.clean and e.member not in targets and e.mono < end
    ]
    incidents = read_incidents(history, evicts=True)
    return Done(
        seed=0,
        kills=len(history.injections),
        seconds=0.0,
        repairs_s=[i.repair_s for i in incidents if i.repair_s is not None],
        problems=problems,
    )


def report(done: Sequence[Done], params: str, options: dict[str, object]) -> Report:
    """The figures of all jobs of the series; pure."""
    kills = sum(d.kills for d in done)
    repairs = [s for d in done for s in d.repairs_s]
    return Report(
        name="kills",
        figures=[
            Figure(name="kills in mid-collective", value=kills, unit=""),
            Figure(
                name="jobs with other bits, or an exception that reached a script",
                value=sum(1 for d in done if d.problems),
                unit="",
                at_most=0,
            ),
            Figure(name="jobs", value=len(done), unit=""),
            Figure(name="seconds", value=sum(d.seconds for d in done), unit="s"),
            Figure(name="kill to all survivors' commit, p50", value=percentile(repairs, 50),
                   unit="s"),
            Figure(name="kill to all survivors' commit, p95", value=percentile(repairs, 95),
                   unit="s"),
        ],
        computed={"params": params},
        problems=[f"seed {d.seed}: {p}" for d in done for p in d.problems],
        options=options,
    )  # fmt: skip


def _one(job: Job, options: argparse.Namespace, seed: int, params: str, folder: Path) -> Done:
    rng = random.Random(seed)
    kills = min(options.a_job, options.kills)
    faults = plan(rng, nproc=job.nproc, kills=kills, gap=options.gap)
    begin = time.monotonic()
    # Many more than any job should survive; giving up is proved elsewhere.
    limits = {"same_place_max": 1_000_000, "restarts_max": 1_000_000, "quiet": True}
    _, events = job.run(folder, faults=faults, settings=limits | _ENV)
    found = judge(events, params, nproc=job.nproc)
    return replace(found, seed=seed, seconds=round(time.monotonic() - begin, 3))


_ENV = {"env": {"PYTHONPATH": str(ROOT)}}


def _undisturbed(job: Job, folder: Path) -> str:
    _, events = job.run(folder, settings=_ENV)
    (params,) = params_of(events)
    return params


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--kills", type=int, default=1000, help="kills of the whole series")
    made.add_argument("--a-job", type=int, default=40, help="kills planned for one job")
    made.add_argument("--gap", type=int, default=30, help="steps between two kills")
    made.add_argument("--nproc", type=int, default=4)
    made.add_argument("--seed", type=int, default=0, help="of the first job; the next has the next")
    made.add_argument("--state", type=Path, help="a file that keeps what was done")
    options = made.parse_args(argv)
    if options.quick:
        options.kills = options.a_job = min(options.kills, 4)
    return options


if __name__ == "__main__":
    sys.exit(main())
