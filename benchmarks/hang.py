"""From a rank that stands still to the survivors' next committed step, with `max_stall_s` 2.

Two faults that a heartbeat does not show, or not at once: SIGSTOP (the whole process is there
and does nothing) and a Python hang (the training thread sleeps for ever, its heartbeat and
all other threads go on). For worlds of 2 and 3 ranks; times as in `repair`, from the moment
before the fault.

The goal is on the 95th percentile: what is waited is `max_stall_s` and not much more. As in
`repair`, one job hosts several faults, and every job must end with the undisturbed job's
parameters, bit for bit.

    python -m benchmarks.hang [--quick] [--json] [--save]
"""

import argparse
import sys
from collections.abc import Sequence

from benchmarks.figures import Figure, Report, as_samples, finish, parser, percentile
from benchmarks.jobs import Job, scratch
from benchmarks.series import Series, run_series
from ftkit.core.fault_plan import Kind

#: The goal, in seconds.
REPAIR_P95_S = 3.0

KINDS = {"stop": Kind.STOP, "hang": Kind.HANG}
PEERS = {
    "stop": "torchft 5.1 s (patched)",
    "hang": "torchft 15 s with 3 ranks, never with 2",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print. Returns the exit code."""
    options = _options(argv)
    with scratch("hang") as folder:
        series = {
            (kind, nproc): run_series(
                Job(nproc=nproc, steps=0, max_stall_s=options.max_stall, slots=options.slots),
                folder / f"{kind}-{nproc}",
                kinds=[KINDS[kind]],
                runs=options.runs,
                gap=options.gap,
                seed=options.seed,
                step_s=0,
            )
            for kind in options.kinds
            for nproc in options.worlds
        }
    return finish(report(series, vars(options)), options)


def report(series: dict[tuple[str, int], Series], options: dict[str, object]) -> Report:
    """The figures of all faults and worlds; pure."""
    figures = list[Figure]()
    for (kind, nproc), s in series.items():
        for what, percent, goal in (
            ("repair_s", 50, None),
            ("repair_s", 95, REPAIR_P95_S),
            ("detect_s", 95, None),
        ):
            values = [
                v
                for r in s.repairs
                if (v := r.repair_s if what == "repair_s" else r.detect_s) is not None
            ]
            figures.append(
                Figure(
                    name=f"{kind}, {nproc} ranks: {what} p{percent}",
                    value=percentile(values, percent),
                    unit="s",
                    at_most=goal,
                    against=PEERS[kind] if goal else "",
                )
            )
    return Report(
        name="hang",
        figures=figures,
        computed={f"parameters of {k}, {n} ranks": s.params for (k, n), s in series.items()},
        problems=[f"{k}: {p}" for (k, _), s in series.items() for p in s.problems],
        notes=[
            f"{k}, {n} ranks: {len(s.not_counted)} faults struck before the world had healed and "
            "are not counted"
            for (k, n), s in series.items()
            if s.not_counted
        ],
        options=options,
        samples={
            f"{kind}-{nproc}": {
                "step_s": s.step_s,
                "repairs": as_samples(s.repairs),
                "not_counted": as_samples(s.not_counted),
            }
            for (kind, nproc), s in series.items()
        },
    )


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--runs", type=int, help="faults to count for each case (20; quick: 2)")
    made.add_argument("--worlds", type=int, nargs="+", default=[2, 3], help="ranks")
    made.add_argument("--kinds", nargs="+", choices=sorted(KINDS), default=sorted(KINDS))
    made.add_argument("--max-stall", type=float, default=2.0, help="max_stall_s of the job")
    made.add_argument("--gap", type=int, default=160, help="steps between two faults of a job")
    made.add_argument("--seed", type=int, default=0, help="decides seats, phases and moments")
    made.add_argument("--slots", type=int, default=12, help="slots of the global batch")
    options = made.parse_args(argv)
    if options.runs is None:
        options.runs = 2 if options.quick else 20
    return options


if __name__ == "__main__":
    sys.exit(main())
