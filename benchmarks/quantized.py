"""Quantized all-reduce against fp32 over the same group, on links as slow as a WAN's.

Each rank has a network namespace whose port is limited in both directions. All forms run in
turn in one run; a time is that of the slowest rank, a figure the ratio of medians::

    200 Mbit/s, 4 MiB    time of int8 / time of fp32, at most 1/3; its error at most 1e-2
    1 Gbit/s, 16 MiB     time of bf16 / time of fp32, at most 1/1.7

The error is |sum - exact sum| / |exact sum| on normal values. Every rank must end with the
same bits in every form, or there are no figures. Without root the links are those of the
loopback: then the figures are shown and judged by nobody.

    python -m benchmarks.quantized [--quick] [--json] [--save]
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from benchmarks.children import Children, python
from benchmarks.figures import Figure, Report, finish, parser, say
from benchmarks.jobs import scratch
from benchmarks.links import Links
from benchmarks.quantized_rank import FORMS


class Case(NamedTuple):
    rate: str
    mib: int
    form: str
    """The form that has a goal."""
    at_most: float
    """Of its time / the time in fp32."""


CASES = (Case("200mbit", 4, "int8", 1 / 3), Case("1gbit", 16, "bf16", 1 / 1.7))
ERROR_MAX = 1e-2


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print. Returns the exit code."""
    options = _options(argv)
    limited = Links.possible()
    with scratch("quantized") as folder:
        measured = {
            (case, size): measure(case, size, options.repetitions, folder, limited=limited)
            for case in CASES
            for size in options.worlds
        }
    return finish(report(measured, vars(options), limited=limited), options)


def measure(
    case: Case, size: int, repetitions: int, folder: Path, *, limited: bool
) -> list[dict[str, Any]]:
    """What each rank found. Blocks for some seconds."""
    say(f"{size} ranks, {case.mib} MiB at {case.rate if limited else 'loopback speed'}")
    place = folder / f"{case.rate}-{size}"
    place.mkdir()
    with Links(size, case.rate) if limited else nullcontext() as links, Children(place) as ranks:
        for rank in range(size):
            command = python(
                *("-m", "benchmarks.quantized_rank", "--rank", str(rank), "--size", str(size)),
                *("--host", links.host(rank) if links else "127.0.0.1"),
                *("--mib", str(case.mib), "--repetitions", str(repetitions)),
                *("--folder", str(place)),
            )
            before = links.inside(rank) if links else ()
            ranks.start([*before, *command], {"OMP_NUM_THREADS": "1"})
        return ranks.wait(timeout_s=120)


def report(
    measured: Mapping[tuple[Case, int], list[dict[str, Any]]],
    options: Mapping[str, object],
    *,
    limited: bool,
) -> Report:
    """The figures of all cases; pure."""
    figures, computed, problems = list[Figure](), dict[str, str](), list[str]()
    for (case, size), ranks in measured.items():
        where = f"{case.rate} {case.mib} MiB, {size} ranks"
        plain_s = median(ranks[0]["times"]["fp32"])
        figures.append(Figure(name=f"{where}: fp32", value=plain_s * 1e3, unit="ms"))
        for form in FORMS[1:]:
            goal = case.at_most if limited and form == case.form else None
            took_s = median(ranks[0]["times"][form])
            figures.append(
                Figure(
                    name=f"{where}: {form} / fp32",
                    value=took_s / plain_s,
                    unit="",
                    at_most=goal,
                    against=f"{plain_s / took_s:.1f} times faster",
                )
            )
            error_max = ERROR_MAX if form == case.form else None
            error = max(rank["errors"][form] for rank in ranks)
            figures.append(
                Figure(name=f"{where}: {form} error", value=error, unit="", at_most=error_max)
            )
        for form in FORMS:
            digests = {rank["digests"][form] for rank in ranks}
            computed[f"{where}: {form}"] = " ".join(f"{d:08x}" for d in sorted(digests))
            if len(digests) > 1:
                problems.append(f"{where}: ranks differ in the bits of {form}")
    notes = ["fp8 costs the bytes of int8, more time to code on a CPU, and about 4 times the error"]
    if not limited:
        notes.append("not root, or no ip and tc: links are not limited; no goal applies")
    return Report(
        name="quantized",
        figures=figures,
        computed=computed,
        problems=problems,
        notes=notes,
        options=options,
        samples={
            f"{c.rate} {n}": [r["times"] for r in ranks] for (c, n), ranks in measured.items()
        },
    )


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--repetitions", type=int, help="of each form (9; quick: 3)")
    made.add_argument("--worlds", type=int, nargs="+", default=[2, 3], help="ranks")
    options = made.parse_args(argv)
    if options.repetitions is None:
        options.repetitions = 3 if options.quick else 9
    return options


if __name__ == "__main__":
    sys.exit(main())
