"""ftkit's collectives against gloo's: bandwidth, latency, training steps, and a kill.

Child processes, one a rank, hold a process group of both and run the same operation by each in
turn (`collective_ranks`). A time is the median over blocks of the slowest rank; a ratio is
ftkit's time over gloo's in the same processes. Beside it stand

    resident    the same all-reduce on a tensor from `ftkit.collectives.resident.resident`
    bound       its adds and copies alone, on the same memory, without any coordination
    exposed     a DDP step minus the same step without DDP
    FSDP2       a step of sharded training; the goal is 0.9 of gloo's
    canonical   the step with canonical reduction over the step with plain all-reduce; after a
                loss: 8 slots on 3 ranks

Over TCP each rank has a network namespace of its own; that needs root. Both sides must compute
the same bits from integers. Kills: `collective_kills`.

    python -m benchmarks.collectives [--only bandwidth tcp step kill] [--quick] [--json] [--save]
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.children import Children, free_port, gloo_environment, python
from benchmarks.collective_kills import Kill, kill_one
from benchmarks.collective_ranks import BLOCK_STEPS, TRAINING
from benchmarks.figures import Figure, Report, finish, parser, percentile, say
from benchmarks.hosts import Hosts
from benchmarks.jobs import scratch

PARTS = ["bandwidth", "tcp", "step", "kill"]
KB, MB = 1 << 10, 1 << 20
SIZES = [4 * KB, 64 * KB, 1 * MB, 4 * MB, 16 * MB, 64 * MB, 256 * MB]
QUICK_SIZES = [4 * KB, 1 * MB, 16 * MB, 64 * MB]
TCP_SIZES = [4 * KB, 1 * MB, 16 * MB, 64 * MB]

Case = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print. Returns the exit code."""
    options = _options(argv)
    figures, notes = list[Figure](), list[str]()
    cases, kills = list[Case](), list[Kill]()
    with scratch("collectives") as folder:
        for world in options.worlds:
            if "bandwidth" in options.only:
                names = [f"all_reduce:{size}" for size in options.sizes]
                large = min(64 * MB, max(options.sizes))
                names += [f"{name}:{large}" for name in ("reduce_scatter", "all_gather")]
                cases += run_ranks(world, names, options.blocks, folder)
            if "step" in options.only:
                # As many slots as ranks, or twice four of which one is lost.
                slots = 8 if world == 3 else world
                cases += run_ranks(world, [f"step:{slots}", "fsdp"], options.blocks, folder)
        if "tcp" in options.only:
            if Hosts.available():
                names = [f"all_reduce:{size}" for size in TCP_SIZES]
                for world in options.worlds:
                    cases += run_ranks(world, names, options.blocks, folder, hosts=True)
            else:
                notes.append("no network namespaces here (not root?): TCP was left out")
    if "kill" in options.only:
        for ranks, size in ((4, 64 * MB), (8, 4 * MB)):
            for seed in range(options.kills):
                kills.append(kill_one(ranks, size, seed))
                say(f"kill {seed} of {ranks} ranks: {kills[-1].first_s * 1e3:.0f} ms")
    for case in cases:
        figures += case_figures(case)
    figures += kill_figures(kills)
    return finish(
        Report(
            name="collectives",
            figures=figures,
            computed={_title(case): " ".join(_digests(case)) for case in cases},
            problems=[*disagreements(cases), *mistakes(kills)],
            notes=notes,
            options=vars(options),
            samples={"cases": cases, "kills": [asdict(kill) for kill in kills]},
        ),
        options,
    )


def run_ranks(
    world: int, cases: Sequence[str], blocks: int, folder: Path, *, hosts: bool = False
) -> list[Case]:
    """All `cases` in one set of processes; see `collective_ranks`. Blocks.

    Args:
      world: ranks.
      cases: what they run.
      blocks: of each side.
      folder: for their output.
      hosts: whether each gets a host of its own, and TCP.
    """
    here = folder / f"{world}-{'hosts' if hosts else 'host'}-{cases[0].replace(':', '-')}"
    here.mkdir()
    port = free_port()
    command = python("-m", "benchmarks.collective_ranks", *cases, "--blocks", str(blocks))
    with ExitStack() as stack:
        network = stack.enter_context(Hosts(world)) if hosts else None
        children = stack.enter_context(Children(here))
        for rank in range(world):
            env = gloo_environment(rank, world, port)
            if network is None:
                children.start(command, env)
                continue
            env |= {"MASTER_ADDR": network.addresses[0], "GLOO_SOCKET_IFNAME": "eth0"}
            children.start(network.command(rank, [*command, "--transport", "tcp"]), env)
        told = children.wait(timeout_s=600)
    merged = [merge(parts, world, hosts=hosts) for parts in zip(*told, strict=True)]
    for case in merged:
        say(f"{_title(case)}: {', '.join(f'{s} {t * 1e3:.3f} ms' for s, t in _times(case))}")
    return merged


def merge(ranks: Sequence[Case], world: int, *, hosts: bool) -> Case:
    """One case of all ranks: the slowest rank's time, everybody's processor time; pure."""
    sides = list(ranks[0]["times"])
    return {
        "case": ranks[0]["case"],
        "ranks": world,
        "hosts": hosts,
        "times": {s: [max(b) for b in zip(*(r["times"][s] for r in ranks), strict=True)]
                  for s in sides},
        "spent": {s: [statistics.fmean(b) for b in zip(*(r["spent"][s] for r in ranks), strict=True)]
                  for s in sides},
        "digests": {s: [r["digests"][s] for r in ranks] for s in sides},
    }  # fmt: skip


def case_figures(case: Case) -> list[Figure]:
    """What one case says, with its goals; pure."""
    name, _, number = case["case"].partition(":")
    if name == "step":
        return step_figures(case)
    if name == "fsdp":
        return fsdp_figures(case)
    times = dict(_times(case))
    size, world, title = int(number), case["ranks"], _title(case)
    factor = 2 * (world - 1) / world if name == "all_reduce" else (world - 1) / world

    def rate(side: str) -> str:
        return f"{size * factor / times[side] / 2**30:.2f} GiB/s"

    limits = f"bound {rate('bound')}, " if "bound" in times else ""
    figures = [
        Figure(
            name=f"{title}: time, ftkit / gloo",
            value=times["ftkit"] / times["gloo"],
            unit="x",
            at_most=goal(name, size, world, hosts=case["hosts"]),
            against=f"gloo {times['gloo'] * 1e3:.3f} ms, {rate('gloo')}; ftkit "
            f"{times['ftkit'] * 1e3:.3f} ms, {rate('ftkit')}; {limits}processor "
            f"{_spent(case, 'ftkit') * 1e3:.2f} / {_spent(case, 'gloo') * 1e3:.2f} ms",
        )
    ]
    if "resident" in times:
        figures.append(
            Figure(
                name=f"{title}: time, resident / bound",
                value=times["resident"] / times["bound"],
                unit="x",
                at_most=1.25 if size >= 16 * MB else None,
                against=f"{times['bound'] * 1e3:.3f} ms; resident {rate('resident')}, "
                f"{times['gloo'] / times['resident']:.2f} x gloo",
            )
        )
    return figures


def goal(name: str, size: int, world: int, *, hosts: bool) -> float | None:
    """The most that ftkit's time may be of gloo's; None where nothing is promised; pure."""
    if name != "all_reduce":
        return {"reduce_scatter": 1 / 5, "all_gather": 1 / 4}[name]
    if hosts:
        return 1 / 3 if size <= 4 * KB else 1 / 1.5 if size >= 16 * MB else None
    if size >= 16 * MB:
        return {2: 1 / 3, 4: 1 / 2.5}.get(world, 1 / 2)
    return 1 / 2 if size >= MB else None


def step_figures(case: Case) -> list[Figure]:
    """Exposed communication, and what canonical reduction costs; pure."""
    times, title = dict(_times(case)), _title(case)
    exposed = {side: times[side] - times["alone"] for side in times}
    lost = case["ranks"] == 3
    told = ", ".join(f"{side} {t / BLOCK_STEPS * 1e3:.1f} ms" for side, t in times.items())
    return [
        Figure(
            name=f"{title}: exposed communication, DDP on ftkit / gloo",
            value=exposed["ftkit"] / exposed["gloo"],
            unit="x",
            at_most=1.0,
            against=f"a step: {told}",
        ),
        Figure(
            name=f"{title}: exposed communication, ftkit's own reduction / DDP on gloo",
            value=exposed["canonical"] / exposed["gloo"],
            unit="x",
            at_most=1.0,
        ),
        Figure(
            name=f"{title}: step, canonical{' after a loss' if lost else ''} / plain",
            value=times["canonical"] / times["ftkit"],
            unit="x",
            at_most=1.5 if lost else 1.05,
            against="DDP over ftkit's all-reduce",
        ),
    ]


def fsdp_figures(case: Case) -> list[Figure]:
    """What a step of sharded training takes; pure."""
    times = dict(_times(case))
    told = ", ".join(f"{side} {t / BLOCK_STEPS * 1e3:.1f} ms" for side, t in times.items())
    return [
        Figure(
            name=f"{_title(case)}: step, ftkit / gloo",
            value=times["ftkit"] / times["gloo"],
            unit="x",
            at_most=0.9,
            against=f"a step: {told}",
        )
    ]


def kill_figures(kills: Sequence[Kill]) -> list[Figure]:
    """Percentiles over the kills of each kind; pure."""
    figures = list[Figure]()
    for ranks in sorted({kill.ranks for kill in kills}):
        mine = [kill for kill in kills if kill.ranks == ranks]
        title = f"kill -9, {ranks} ranks, {_size(mine[0].size)}"
        messages = max(kill.messages for kill in mine)
        figures += [
            Figure(
                name=f"{title}: to the survivors' first all-reduce, p95",
                value=percentile([kill.first_s for kill in mine], 95),
                unit="s",
                at_most=0.1 if ranks == 4 else None,
                against="PCCL 105-420 ms; gloo waits for its timeout",
            ),
            Figure(
                name=f"{title}: of that until it is noticed, p50",
                value=percentile([kill.detect_s for kill in mine], 50),
                unit="s",
            ),
            Figure(
                name=f"{title}: the edit, noticed to usable, p95",
                value=percentile([kill.edit_s for kill in mine], 95),
                unit="s",
                at_most=0.02,
                against=f"at most {messages} messages a survivor, "
                f"{sum(kill.connections for kill in mine)} new connections; ElasWave 1 s",
            ),
        ]
    return figures


def disagreements(cases: Sequence[Case]) -> list[str]:
    """Cases in which two sides that must agree did not; pure."""
    found = list[str]()
    for case in cases:
        digests, name = case["digests"], case["case"].partition(":")[0]
        operation = name not in TRAINING
        for side in ("ftkit", "resident") if operation else ():
            if side in digests and digests[side] != digests["gloo"]:
                found.append(f"{_title(case)}: {side} and gloo computed different results")
        if name == "step" and len(set(digests["canonical"])) != 1:
            found.append(f"{_title(case)}: ranks ended with different parameters")
    return found


def mistakes(kills: Sequence[Kill]) -> list[str]:
    """Kills after which something was not as it must be; pure."""
    return [
        f"after a kill of {kill.ranks} ranks: {kill.wrong} wrong results, "
        f"{kill.connections} new connections"
        for kill in kills
        if kill.wrong or kill.connections
    ]


def _times(case: Case) -> list[tuple[str, float]]:
    return [(side, statistics.median(times)) for side, times in case["times"].items()]


def _spent(case: Case, side: str) -> float:
    return float(statistics.median(case["spent"][side]))


def _digests(case: Case) -> list[str]:
    return sorted({d for side, ds in case["digests"].items() if side != "bound" for d in ds})


def _title(case: Case) -> str:
    name, _, number = case["case"].partition(":")
    if name == "fsdp":
        return f"FSDP2, {case['ranks']} ranks"
    what = f"{number} slots" if name == "step" else _size(int(number))
    return f"{name}, {case['ranks']} {'hosts' if case['hosts'] else 'ranks'}, {what}"


def _size(size: int) -> str:
    return f"{size // MB} MB" if size >= MB else f"{size // KB} KB"


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    made.add_argument("--worlds", type=int, nargs="+", default=[2, 3, 4], help="ranks")
    made.add_argument("--sizes", type=int, nargs="+", help="bytes, of one host's all-reduces")
    made.add_argument("--blocks", type=int, help="of each side and case (9; quick: 5)")
    made.add_argument("--kills", type=int, help="of each kind (20; quick: 5)")
    options = made.parse_args(argv)
    options.sizes = options.sizes or (QUICK_SIZES if options.quick else SIZES)
    options.blocks = options.blocks or (5 if options.quick else 9)
    options.kills = options.kills or (5 if options.quick else 20)
    return options


if __name__ == "__main__":
    sys.exit(main())
