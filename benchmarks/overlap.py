"""What overlap hides: each way against the one it replaces, over links of a known rate.

Ranks are processes in network namespaces of their own, joined by limited links (needs root), so
that the link and not the processor is the limit. The sides of a part run in the same processes, in
turn; a time is the median over rounds of the slowest rank. A part that fails, or that no time is left
for, has a row that says so.

    modelled    a row-parallel linear's exchange on a modelled link, against all computed first
    linear      a row-parallel linear on 2 hosts, against compute-then-reduce-scatter
    weave       layers in two halves on 2 hosts, forward and backward, against whole, at rates where
                computing and sending beside each other would be so many times as fast
    attention   a causal ring on 4 hosts, forward and backward, by each route; `grouped`: 8 heads on 2
    traffic     DDP with emulated computing beside a snapshot to the peer, in each way
    ddp         DDP through ftkit with a vote, against plain and against a hook that waits

`linear-emulated` and `weave-emulated` are the same with computing that sleeps: ranks that compute
on as many cores as there are leave none to what sends, and then the cores are the limit.

    python -m benchmarks.overlap [--only linear ...] [--rounds N] [--limit SECONDS] [--quick] [--json] [--save]
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.children import Children, free_port, gloo_environment, python
from benchmarks.figures import Figure, Report, finish, parser, say
from benchmarks.jobs import JobFailed, ended_by_sigterm, scratch
from benchmarks.links import Links
from benchmarks.overlap_modelled import on_a_model
from benchmarks.wires import Wires

PARTS = [
    *("modelled", "linear", "linear-emulated", "weave", "weave-emulated"),
    *("attention", "grouped", "traffic", "ddp"),
]


@dataclass(frozen=True, slots=True)
class Plan:
    """How a part is run."""

    ranks: int
    mbit: tuple[int | None, ...]
    """Of each link; None: as fast as it goes."""
    seconds: float
    """After which no round begins, but for three."""
    bounds: tuple[float, ...] = ()
    """Computing and sending one after another, over beside each other: further links, whose rate
    follows from how long computing took on the first. Sending takes less than computing."""
    rounds: int = 1
    """For each that was asked for, within `seconds`: sides a percent apart need more than others."""


PLANS = {
    "linear": Plan(2, (400, 1000, None), 20),
    "weave": Plan(2, (None,), 45, bounds=(1.6, 1.3), rounds=2),
    "linear-emulated": Plan(2, (400, 1000, None), 20),
    "weave-emulated": Plan(2, (None,), 35, bounds=(1.6, 1.3)),
    "attention": Plan(4, (100,), 30),
    "grouped": Plan(4, (25,), 30),
    "traffic": Plan(2, (1000, 2000), 60),
    "ddp": Plan(2, (1000, 2000), 20, rounds=5),
}
#: No limit, as tc writes it.
FREE = 100_000

#: Of all; what is not begun by then is left out, and said to be. And of one run, beside its rounds.
LIMIT_S, STARTING_S = 900.0, 90.0


def run(
    part: str, mbit: int | None, rounds: int, folder: Path, *, wires: bool, timeout_s: float
) -> Any:
    """One part in processes of its own; what each rank says. Blocks.

    Raises:
      JobFailed: a rank failed, or did not end in time.
    """
    plan = PLANS[part]
    here = folder / f"{part}-{mbit}-{'wires' if wires else 'port'}"
    here.mkdir()
    rate, size = mbit or FREE, plan.ranks
    command = python(
        *("-m", "benchmarks.overlap_rank", part, "--rounds", str(rounds * plan.rounds)),
        *("--seconds", str(plan.seconds), "--rate", str(rate * 125e3)),
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
                env |= {
                    "MASTER_ADDR": network.host(0),
                    "GLOO_SOCKET_IFNAME": network.device(rank),
                }
                children.start(network.command(rank, command), env)
        return children.wait(timeout_s)


def times(found: Sequence[Any]) -> dict[str, float]:
    """Median seconds by side: of each round the slowest rank's."""
    sides = found[0]["times"]
    return {
        side: median(max(one) for one in zip(*(f["times"][side] for f in found), strict=True))
        for side in sides
    }


def named(mbit: int | None, bound: float | None) -> str:
    """A link, as figures call it: not by a rate that is another on each machine."""
    if bound is not None:
        return f"bound {bound:g}"
    return "free link" if mbit is None else f"{mbit} Mbit"


def rate_for(bound: float, compute_s: float, sent: int) -> int:
    """Mbit/s at which sending so many bytes takes `bound` - 1 of the time of computing. Pure."""
    return max(1, round(sent / ((bound - 1) * compute_s) / 125e3))


def figures_of(
    part: str,
    mbit: int | None,
    found: Sequence[Any],
    *,
    wires: bool,
    bound: float | None = None,
) -> list[Figure]:
    """What a part says; pure."""
    s = times(found)
    link = named(mbit, bound)
    told = ", ".join(f"{side} {seconds * 1e3:.1f}" for side, seconds in s.items()) + " ms"
    if bound is not None:
        told += f", {mbit} Mbit"

    def figure(name: str, value: float, unit: str = "x", **goal: float) -> Figure:
        return Figure(name=f"{name}, {link}", value=value, unit=unit, against=told, **goal)

    part, emulated = part.removesuffix("-emulated"), part.endswith("-emulated")
    how = ", computing emulated" if emulated else ""
    match part:
        case "linear":
            what, over = f"row-parallel linear{how}", s["ftkit"] / s["overlapped"]
            if mbit is None:
                name = f"{what}: ftkit's reduce-scatter / overlapped"
                return [figure(name, over, at_least=0.97)]
            bound = max(s["compute"], found[0]["sent"] / (mbit * 125e3))
            goal = 2.2 if mbit <= 400 else 2.0
            return [
                figure(f"{what}: gloo / overlapped", s["gloo"] / s["overlapped"], at_least=goal),
                figure(f"{what}: bound / overlapped", bound / s["overlapped"], at_least=0.85),
                figure(f"{what}: ftkit's reduce-scatter / overlapped", over),
            ]
        case "weave":
            hideable = min(s["compute"], s["whole"] - s["compute"])
            kept = figure(f"woven layers{how}: whole / auto", s["whole"] / s["auto"], at_least=0.97)
            if mbit is None:
                return [kept]
            hidden = (s["whole"] - s["halves"]) / hideable if hideable > 0 else 0.0
            return [
                kept,
                figure(f"woven layers{how}: communication hidden", 100 * hidden, "%", at_least=75),
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
            used = found[0]["bytes"] / (mbit * 125e3 * found[0]["idle_share"] * took)
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


class Measured:
    """What was found so far."""

    def __init__(self, rounds: int, folder: Path, limit_s: float) -> None:
        self._rounds, self._folder = rounds, folder
        self._end = time.monotonic() + limit_s
        self.figures, self.problems, self.samples = list[Figure](), list[str](), list[Any]()

    def part(self, part: str) -> None:
        """All links of one part."""
        plan = PLANS[part]
        links: list[tuple[int | None, float | None]] = [(mbit, None) for mbit in plan.mbit]
        for wires in (True, False) if part in ("attention", "grouped") else (False,):
            first: Any = None
            for mbit, _ in links:
                found = self._link(part, mbit, wires=wires)
                first = first or found
            for bound in plan.bounds:
                if first is None:
                    self._missing(part, named(None, bound), "the first link was not measured")
                    continue
                mbit = rate_for(bound, times(first)["compute"], first[0]["sent"])
                self._link(part, mbit, wires=wires, bound=bound)

    def _link(self, part: str, mbit: int | None, *, wires: bool, bound: float | None = None) -> Any:
        left_s = self._end - time.monotonic()
        timeout_s = min(left_s, STARTING_S + 3 * PLANS[part].seconds)
        link = named(mbit, bound) + (", own wires" if wires else "")
        if left_s < PLANS[part].seconds:
            return self._missing(part, link, "there was no time left")
        try:
            found = run(part, mbit, self._rounds, self._folder, wires=wires, timeout_s=timeout_s)
        except JobFailed as failed:
            return self._missing(part, link, str(failed))
        made = figures_of(part, mbit, found, wires=wires, bound=bound)
        for figure in made:
            say(f"{figure.name}: {figure.value:.3f} ({figure.against})")
        self.figures += made
        self.problems += problems_of(part, mbit, found)
        sample = {"part": part, "mbit": mbit, "bound": bound, "wires": wires, "ranks": found}
        self.samples.append(sample)
        return found

    def _missing(self, part: str, link: str, why: str) -> None:
        """A row all the same, which does not hold."""
        say(f"{part}, {link}: {why}")
        row = Figure(name=f"{part}, {link}", value=None, unit="", at_least=0.0, against=why[-200:])
        self.figures.append(row)


def measure(parts: Sequence[str], rounds: int, folder: Path, limit_s: float) -> Report:
    """All parts, one after another; at most about `limit_s`."""
    measured = Measured(rounds, folder, limit_s)
    notes = ["not measured: what needs CUDA"]
    if "modelled" in parts:
        measured.figures.append(on_a_model())
    if Links.possible() and Wires.available():
        for part in parts:
            if part in PLANS:
                measured.part(part)
    elif set(parts) & set(PLANS):
        measured.problems.append("limited links need root: nothing was run on them")
    samples = measured.samples
    forecasts = [f["forecast"] for s in samples for f in s["ranks"][:1] if "forecast" in f]
    digests = {
        f"{s['part']}, {s['mbit']} Mbit": str(s["ranks"][0]["digests"]["overlapped"])
        for s in samples
        if "digests" in s["ranks"][0]
    }
    return Report(
        name="overlap",
        figures=measured.figures,
        computed=digests,
        problems=measured.problems,
        notes=[*notes, *(f"what the governor said of a snapshot: {told}" for told in forecasts)],
        samples=samples,
    )


def main(argv: Sequence[str] | None = None) -> int:
    made = parser(__doc__)
    made.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    made.add_argument("--rounds", type=int, help="of each side (9; quick: 3)")
    made.add_argument("--limit", type=float, default=LIMIT_S, help="seconds, of all (%(default)g)")
    options = made.parse_args(argv)
    rounds = options.rounds or (3 if options.quick else 9)
    with ended_by_sigterm(), scratch("overlap") as folder:
        report = measure(options.only, rounds, folder, options.limit)
    return finish(report, options)


if __name__ == "__main__":
    sys.exit(main())
