"""What overlap hides: each way against the one it replaces, over links of a known rate.

Ranks are processes in network namespaces of their own, joined by limited links (needs root), so
that the link and not the processor is the limit. The sides of a part run in the same processes, in
turn; a time is the median over rounds of the slowest rank.

    linear      a row-parallel linear on 2 hosts, against compute-then-reduce-scatter
    weave       layers in two halves on 2 hosts, forward and backward, against whole
    attention   a causal ring on 4 hosts, forward and backward, by each route; `grouped`: 8 heads on 2
    traffic     DDP with emulated computing beside a snapshot to the peer, in each way
    ddp         DDP through ftkit with a vote, against plain and against a hook that waits

    python -m benchmarks.overlap [--only linear ...] [--rounds N] [--quick] [--json] [--save]
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.children import Children, free_port, gloo_environment, python
from benchmarks.figures import Figure, Report, finish, parser, say
from benchmarks.jobs import ended_by_sigterm, scratch
from benchmarks.links import Links
from benchmarks.wires import Wires

PARTS = ["linear", "weave", "attention", "grouped", "traffic", "ddp"]
#: Of each part: ranks, and the rates of the links in Mbit/s; None: as fast as they go.
RATES: dict[str, tuple[int, list[int | None]]] = {
    "linear": (2, [400, 1000, None]),
    "weave": (2, [400, 1000, None]),
    "attention": (4, [100]),
    "grouped": (4, [25]),
    "traffic": (2, [1000, 2000]),
    "ddp": (2, [1000, 2000]),
}
#: No limit, as tc writes it.
FREE = 100_000


def run(part: str, size: int, mbit: int | None, rounds: int, folder: Path, *, wires: bool) -> Any:
    """One part in processes of its own; what each rank says. Blocks."""
    here = folder / f"{part}-{mbit}-{'wires' if wires else 'port'}"
    here.mkdir()
    rate = mbit or FREE
    command = python(
        "-m", "benchmarks.overlap_rank", part, "--rounds", str(rounds), "--rate", str(rate * 125e3)
    )
    network = Wires(size, rate) if wires else Links(size, f"{rate}mbit")
    with network, Children(here) as children:
        port = free_port()
        for rank in range(size):
            env = gloo_environment(rank, size, port)
            if isinstance(network, Wires):
                env |= {"MASTER_ADDR": network.addresses[0]}
                children.start(network.command(rank, command), env)
            else:
                device = f"{network.inside(rank)[3].rpartition('n')[0]}a{rank}"
                env |= {"MASTER_ADDR": network.host(0), "GLOO_SOCKET_IFNAME": device}
                children.start([*network.inside(rank), *command], env)
        return children.wait(timeout_s=600)


def times(found: Sequence[Any]) -> dict[str, float]:
    """Median seconds by side: of each round the slowest rank's."""
    sides = found[0]["times"]
    return {
        side: median(max(one) for one in zip(*(f["times"][side] for f in found), strict=True))
        for side in sides
    }


def figures_of(part: str, mbit: int | None, found: Sequence[Any], *, wires: bool) -> list[Figure]:
    """What a part says; pure."""
    s = times(found)
    link = "free link" if mbit is None else f"{mbit} Mbit"
    told = ", ".join(f"{side} {seconds * 1e3:.1f}" for side, seconds in s.items()) + " ms"

    def figure(name: str, value: float, unit: str = "x", **goal: float) -> Figure:
        return Figure(name=f"{name}, {link}", value=value, unit=unit, against=told, **goal)

    match part:
        case "linear":
            over = s["ftkit"] / s["overlapped"]
            if mbit is None:
                name = "row-parallel linear: ftkit's reduce-scatter / overlapped"
                return [figure(name, over, at_least=0.97)]
            bound = max(s["compute"], found[0]["sent"] / (mbit * 125e3))
            goal = 2.2 if mbit <= 400 else 2.0
            return [
                figure(
                    "row-parallel linear: gloo / overlapped",
                    s["gloo"] / s["overlapped"],
                    at_least=goal,
                ),
                figure(
                    "row-parallel linear: bound / overlapped",
                    bound / s["overlapped"],
                    at_least=0.85,
                ),
                figure("row-parallel linear: ftkit's reduce-scatter / overlapped", over),
            ]
        case "weave":
            hideable = min(s["compute"], s["whole"] - s["compute"])
            kept = figure("woven layers: whole / auto", s["whole"] / s["auto"], at_least=0.97)
            if mbit is None:
                return [kept]
            hidden = (s["whole"] - s["halves"]) / hideable if hideable > 0 else 0.0
            return [
                kept,
                figure("woven layers: communication hidden", 100 * hidden, "%", at_least=75),
            ]
        case "attention" | "grouped":
            heads = "8 heads" if part == "attention" else "8 heads on 2"
            if wires:
                ratio = s["kv"] / s["auto"]
                return [
                    figure(
                        f"ring attention, {heads}, own wires: one way / auto", ratio, at_least=1.5
                    )
                ]
            best = min(s["kv"], s["allgather"])
            name = f"ring attention, {heads}, one port: better of one way and all-gather / auto"
            return [figure(name, best / s["auto"], at_least=0.97)]
        case "traffic":
            slow = {m: 100 * (s[m] / s["none"] - 1) for m in ("block", "blast", "governed")}
            took = median(max(f["took"]) for f in found)
            assert mbit is not None, "the rate is known"
            step = s["none"] / 12
            idle = found[0]["window_s"] * took / step
            used = found[0]["bytes"] / (mbit * 125e3) / idle
            return [
                figure(
                    "DDP beside a snapshot, governed: slow-down", slow["governed"], "%", at_most=1.5
                ),
                figure("DDP beside a snapshot, one send: slow-down", slow["blast"], "%"),
                figure("DDP beside a snapshot, blocking: slow-down", slow["block"], "%"),
                figure(
                    "DDP beside a snapshot: of the idle windows used", 100 * used, "%", at_least=70
                ),
            ]
        case _:
            return [
                figure("DDP with a vote / plain", s["vote"] / s["plain"], at_most=1.02),
                figure(
                    "DDP: a hook that waits / with a vote", s["wait"] / s["vote"], at_least=1.35
                ),
            ]


def problems_of(part: str, mbit: int | None, found: Sequence[Any]) -> list[str]:
    """What was computed wrongly; pure."""
    said = []
    for rank, one in enumerate(found):
        if len(set(one.get("digests", {}).values())) > 1:
            said.append(
                f"{part}, {mbit} Mbit: rank {rank} computed different sums: {one['digests']}"
            )
        if one.get("error", 0.0) > 1e-4:
            said.append(f"{part}, {mbit} Mbit: sides differ by {one['error']:.1e} at rank {rank}")
    return said


def measure(parts: Sequence[str], rounds: int, folder: Path) -> Report:
    """All parts, one after another."""
    if not (Links.possible() and Wires.available()):
        return Report(
            name="overlap", figures=[], computed={}, notes=["needs root: nothing was run"]
        )
    figures, problems, samples = list[Figure](), list[str](), list[Any]()
    for part in parts:
        size, rates = RATES[part]
        for mbit in rates:
            for wires in (True, False) if part in ("attention", "grouped") else (False,):
                found = run(part, size, mbit, rounds, folder, wires=wires)
                made = figures_of(part, mbit, found, wires=wires)
                for figure in made:
                    say(f"{figure.name}: {figure.value:.3f} ({figure.against})")
                figures += made
                problems += problems_of(part, mbit, found)
                samples.append({"part": part, "mbit": mbit, "wires": wires, "ranks": found})
    forecasts = [f["forecast"] for s in samples for f in s["ranks"][:1] if "forecast" in f]
    digests = {
        f"linear, {s['mbit']} Mbit": str(s["ranks"][0]["digests"]["overlapped"])
        for s in samples
        if s["part"] == "linear"
    }
    return Report(
        name="overlap",
        figures=figures,
        computed=digests,
        problems=problems,
        notes=[f"what the governor said of a snapshot: {told}" for told in forecasts],
        samples=samples,
    )


def main(argv: Sequence[str] | None = None) -> int:
    made = parser(__doc__)
    made.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    made.add_argument("--rounds", type=int, help="of each side (9; quick: 3)")
    options = made.parse_args(argv)
    rounds = options.rounds or (3 if options.quick else 9)
    with ended_by_sigterm(), scratch("overlap") as folder:
        report = measure(options.only, rounds, folder)
    return finish(report, options)


if __name__ == "__main__":
    sys.exit(main())
