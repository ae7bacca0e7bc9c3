"""From SIGKILL to the survivors' next committed step, at default settings.

A rank kills itself with SIGKILL at a random phase of a random step (the seed decides); the
moment before that system call is time 0. For worlds of 2, 3 and 4 ranks, with steps of about
50 ms::

    detect_s      to the first verdict against the dead rank, or the first halt
    replay_s      until the *last* survivor began its next step in the new generation:
                  the repair without the repeated step
    repair_s      until the *last* survivor had committed that step: the repeated step included

Which step "its next" is: the one that was cut short, played again; where a survivor had seen
its vote pass, the step is rolled forward, and the next one is meant. A commit in the old
generation (a vote that was passing already) never counts as repaired.

One job hosts several kills, one a seat, far enough apart for the dead rank to be back before
the next one; a kill that comes too early is listed and not counted. Every job must end with
the undisturbed job's parameters, bit for bit, or there are no figures.

    python -m benchmarks.repair [--quick] [--json] [--save]
"""

import argparse
import sys
from collections.abc import Sequence

from benchmarks.faults import Repair
from benchmarks.figures import Figure, Report, as_samples, finish, parser, percentile
from benchmarks.jobs import Job, scratch
from benchmarks.series import Series, run_series
from ftkit.core.fault_plan import Kind

#: Goals, in seconds.
REPAIR_P50_S, REPAIR_P95_S, REPLAY_S = 0.3, 1.0, 0.15

PEERS = "torchft 5.0 s (patched); NVRx 1.3 s, state gone; torchrun restarts all"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print. Returns the exit code."""
    options = _options(argv)
    with scratch("repair") as folder:
        series = [
            run_series(
                Job(nproc=nproc, steps=0, slot_size=options.slot_size, slots=options.slots),
                folder / str(nproc),
                kinds=[Kind.KILL],
                runs=options.runs,
                gap=options.gap,
                seed=options.seed,
                step_s=options.step_s,
            )
            for nproc in options.worlds
        ]
    return finish(report(series, vars(options)), options)


def report(series: Sequence[Series], options: dict[str, object]) -> Report:
    """The figures of all worlds; pure."""
    figures = list[Figure]()
    for s in series:
        figures += _figures(s)
    return Report(
        name="repair",
        figures=figures,
        computed={f"parameters of {s.nproc} ranks": s.params for s in series},
        problems=[p for s in series for p in s.problems],
        notes=[
            f"{s.nproc} ranks: {len(s.not_counted)} kills struck before the world had healed and "
            "are not counted"
            for s in series
            if s.not_counted
        ],
        options=options,
        samples={
            str(s.nproc): {
                "slot_size": s.slot_size,
                "step_s": s.step_s,
                "repairs": as_samples(s.repairs),
                "not_counted": as_samples(s.not_counted),
            }
            for s in series
        },
    )


def _figures(s: Series) -> list[Figure]:
    def figure(what: str, percent: float, goal: float | None, against: str = "") -> Figure:
        values = [v for r in s.repairs if (v := _part(r, what)) is not None]
        return Figure(
            name=f"{s.nproc} ranks: {what} p{percent:g}",
            value=percentile(values, percent),
            unit="s",
            at_most=goal,
            against=against,
        )

    return [
        Figure(name=f"{s.nproc} ranks: median step", value=s.step_s, unit="s"),
        figure("repair_s", 50, REPAIR_P50_S, PEERS),
        figure("repair_s", 95, REPAIR_P95_S),
        figure("replay_s", 50, REPLAY_S, "repair without the repeated step"),
        figure("replay_s", 95, None),
        figure("detect_s", 50, None),
        figure("detect_s", 95, None),
    ]


def _part(repair: Repair, what: str) -> float | None:
    return {"repair_s": repair.repair_s, "replay_s": repair.replay_s, "detect_s": repair.detect_s}[
        what
    ]


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--runs", type=int, help="kills to count for each world (20; quick: 2)")
    made.add_argument("--worlds", type=int, nargs="+", default=[2, 3, 4], help="ranks")
    made.add_argument("--gap", type=int, default=160, help="steps between two kills of a job")
    made.add_argument("--seed", type=int, default=0, help="decides seats, phases and moments")
    made.add_argument("--step-s", type=float, default=0.05, help="step wanted; 0: as it comes")
    made.add_argument("--slot-size", type=int, default=2, help="samples of a slot to begin with")
    made.add_argument("--slots", type=int, default=12, help="slots of the global batch")
    options = made.parse_args(argv)
    if options.runs is None:
        options.runs = 2 if options.quick else 20
    return options


if __name__ == "__main__":
    sys.exit(main())
