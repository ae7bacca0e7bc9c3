"""What a planned ring, and several connections to a neighbour, are worth.

`ring`: four hosts (network namespaces, a wire of its own between each two), one wire slowed ten
times. An all-reduce in the order of ranks, which crosses the slow wire, and one in the order
that the members planned from what they measured, in turn, in each round. Needs root.

`connections`: two processes whose every connection may send 20 MB/s (`SO_MAX_PACING_RATE`): an
all-reduce over four connections against one, in jobs that alternate.

    python -m benchmarks.rings [--rounds 7] [--megabytes 32] [--quick] [--json] [--save]
"""

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.children import Children, python
from benchmarks.figures import Figure, Report, finish, parser, say
from benchmarks.jobs import ended_by_sigterm
from benchmarks.wires import Wires

HOSTS = 4
MBIT, SLOW_MBIT = 1000, 100
SLOW = (0, 1)
CAP = 20_000_000
LANES = 4


def job(size: int, rounds: int, megabytes: int, *extra: str, wires: Wires | None = None) -> Any:
    """Run one job; what each member says. Blocks."""
    with (
        tempfile.TemporaryDirectory(prefix="ftkit-rings-") as folder,
        Children(Path(folder)) as children,
    ):
        for rank in range(size):
            host = wires.addresses[rank] if wires else "127.0.0.1"
            command = python(
                "-m", "benchmarks.ring_member", "--folder", folder, "--rank", str(rank),
                "--size", str(size), "--host", host, "--rounds", str(rounds),
                "--megabytes", str(megabytes), *extra,
            )  # fmt: skip
            children.start(wires.command(rank, command) if wires else command, {})
        return children.wait(60 + rounds * megabytes)


def slowest(found: Any, kind: str) -> list[float]:
    """Seconds of each round: the slowest member's."""
    return [max(times) for times in zip(*(f["seconds"][kind] for f in found), strict=True)]


def ring(rounds: int, megabytes: int) -> tuple[Figure, Any, dict[str, str]]:
    """The planned ring against the natural one."""
    name = "all-reduce, 4 hosts, one wire 10x slower: planned ring / order of ranks"
    if not Wires.available():
        return Figure(name=name, value=None, unit="x", at_most=0.5, against="needs root"), [], {}
    with Wires(HOSTS, MBIT, {SLOW: SLOW_MBIT}) as wires:
        found = job(HOSTS, rounds, megabytes, wires=wires)
    naive, planned = slowest(found, "naive"), slowest(found, "planned")
    ratio = median(p / n for p, n in zip(planned, naive, strict=True))
    figure = Figure(
        name=name,
        value=ratio,
        unit="x",
        at_most=0.5,
        against=f"naive {median(naive):.3f} s, planned {median(planned):.3f} s, {megabytes} MB",
    )
    rings = sorted({"-".join(map(str, order)) for f in found for order in f["rings"]})
    return figure, found, {"rings planned": ", ".join(rings)}


def connections(rounds: int, megabytes: int) -> tuple[Figure, Any, dict[str, str]]:
    """Four connections against one, each capped."""
    times: dict[int, list[float]] = {1: [], LANES: []}
    every = []
    for number in range(rounds):
        for lanes in (1, LANES) if number % 2 else (LANES, 1):
            found = job(2, 1, megabytes, "--connections", str(lanes), "--cap", str(CAP))
            # Natural or planned: with two members the ring is the same.
            times[lanes].append(median(slowest(found, "naive") + slowest(found, "planned")))
            every.append({"connections": lanes, "members": found})
    ratio = median(many / one for many, one in zip(times[LANES], times[1], strict=True))
    figure = Figure(
        name=f"all-reduce, {CAP // 10**6} MB/s a connection: {LANES} connections / 1",
        value=ratio,
        unit="x",
        at_most=1 / 3.5,
        against=f"1: {median(times[1]):.3f} s, {LANES}: {median(times[LANES]):.3f} s",
    )
    crcs = {f["crc"] for e in every for f in e["members"]}
    return figure, every, {"CRC-32 over connections": ", ".join(f"{c:08x}" for c in sorted(crcs))}


def measure(rounds: int, megabytes: int) -> Report:
    """Both, one after the other."""
    figures, computed, samples, problems = [], dict[str, str](), [], list[str]()
    for part in (ring, connections):
        figure, found, facts = part(rounds, megabytes if part is ring else megabytes // 2)
        say(f"{figure.name}: {figure.value} ({figure.against})")
        figures.append(figure)
        computed |= facts
        samples.append(found)
        members = found if part is ring else [f for e in found for f in e["members"]]
        problems += [fault for member in members for fault in member["faults"]]
        if len({m["crc"] for m in members}) > 1:
            problems.append(f"{part.__name__}: members or jobs computed different sums")
    return Report(
        name="rings", figures=figures, computed=computed, problems=problems, samples=samples
    )


def main(argv: Sequence[str] | None = None) -> int:
    made = parser(__doc__)
    made.add_argument("--rounds", type=int, help="rounds of each (7; quick: 3)")
    made.add_argument("--megabytes", type=int, help="size of the all-reduce (32; quick: 16)")
    options = made.parse_args(argv)
    with ended_by_sigterm():
        found = measure(
            options.rounds or (3 if options.quick else 7),
            options.megabytes or (16 if options.quick else 32),
        )
    return finish(replace(found, options=vars(options)), options)


if __name__ == "__main__":
    sys.exit(main())
