"""A soak of the data plane under churn: every operation's numbers are checked.

Up to six peers run rounds of concurrent collectives (sums, canonical sums, gathers, broadcasts,
all-to-all, send and receive, shared state) on the world and on half of it. Every half second to
two seconds a peer is started, killed with SIGKILL, or frozen and woken when the world has moved
on without it. Each result of each rank is compared with what it must be, to the last bit; a
wrong one, one that does not come, or a peer that leaves by itself ends the soak.

    python -m benchmarks.churn [--minutes 10 | --hours 8] [--peers 6] [--seed N] [--json] [--save]
"""

import argparse
import secrets
import sys
from collections.abc import Sequence

from benchmarks.churn_host import Host, Tally
from benchmarks.figures import Figure, Report, finish, parser, percentile
from benchmarks.jobs import ended_by_sigterm


def main(argv: Sequence[str] | None = None) -> int:
    """Soak and print. Returns the exit code."""
    options = _options(argv)
    with ended_by_sigterm():
        tally = Host(peers=options.peers, seed=options.seed).run(options.seconds)
    return finish(report(tally, vars(options)), options)


def report(tally: Tally, options: dict[str, object]) -> Report:
    """The figures of a soak; pure."""
    repairs = [s * 1e3 for s in tally.repairs_s]
    p50, p95 = percentile(repairs, 50), percentile(repairs, 95)
    against = "all survivors have completed a checked round, of some 3 to 10 operations"
    return Report(
        name="churn",
        figures=[
            Figure(name="seconds", value=tally.seconds, unit="s"),
            Figure(name="operations checked", value=tally.checked, unit=""),
            Figure(name="wrong results, hangs, lost peers", value=len(tally.wrong), unit="",
                   at_most=0),
            Figure(name="kills", value=tally.kills, unit=""),
            Figure(name="freezes", value=tally.freezes, unit=""),
            Figure(name="joins", value=tally.started, unit=""),
            Figure(name="worlds in which all worked", value=tally.settled, unit=""),
            Figure(name="kill to all survivors' round, p50", value=p50, unit="ms",
                   against=against),
            Figure(name="kill to all survivors' round, p95", value=p95, unit="ms"),
        ],
        computed={
            "checked": ", ".join(f"{n} {kind}" for kind, n in sorted(tally.operations.items())),
            "world sizes": ", ".join(f"{s}: {n}" for s, n in sorted(tally.sizes.items())),
        },
        problems=tally.wrong,
        notes=["PCCL's stress test has the same schedule and checks no numbers"],
        options=options,
    )  # fmt: skip


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    made = parser(__doc__)
    length = made.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=10.0)
    length.add_argument("--hours", type=float)
    made.add_argument("--peers", type=int, default=6, help="the most that live at a time")
    made.add_argument("--seed", type=int, default=secrets.randbelow(1 << 16))
    options = made.parse_args(argv)
    minutes = options.hours * 60 if options.hours else options.minutes
    options.seconds = 15.0 if options.quick else minutes * 60
    return options


if __name__ == "__main__":
    sys.exit(main())
