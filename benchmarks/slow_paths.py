"""A path between hosts gets three times slower while a job trains: is it named, and how soon?

Four hosts are network namespaces with a wire of their own between each two, limited by `tc tbf`; an
agent and one rank run on each, as in a job on four machines: their memory is one, so that they are
told to leave it alone. A run trains until the paths have been
measured, makes something slow, and waits for a word: a link both ways, one direction of it, all
that leaves a host, all that reaches it, a link that training does not use, nothing at all. Needs
root.
"""

import argparse
import itertools
import os
import signal
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.children import Children
from benchmarks.figures import Figure, Report, finish, parser, percentile, say
from benchmarks.hosts_job import START_S, HostsJob
from benchmarks.jobs import JobFailed, scratch
from benchmarks.wires import Wires
from ftkit.launch.arenas import sweep
from ftkit.launch.drill_catalogue import WORKLOAD
from ftkit.launch.job import python_command

HOSTS, MBIT, TIMES = 4, 600, 3
#: Large enough that the wires matter: 16 MB of gradients.
MODEL = ("--params", "4m")
#: Steps that are played before anything is slow, and how long a word is waited for.
STEPS_BEFORE, WAIT_S = 20, 40.0
#: Steps in which it is seen which wires training uses.
STEPS_WATCHED = 5
#: Where nothing is to be said: so long is listened.
LISTEN_S = 15.0

Way = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What came of one run."""

    scenario: str
    wanted: list[object] | None
    """Where, place and peer; None when nothing may be named."""
    said: list[list[object]]
    """The same of what was named for communication, in order."""
    right: bool
    steps: int | None = None
    """Committed from the fault until the probe began."""
    probe_s: float | None = None
    named_s: float | None = None
    """From the fault to the word."""
    step_s: float | None = None
    slow_step_s: float | None = None


class Run(HostsJob):
    """One job on hosts of its own, until something is slow."""

    def __init__(self, wires: Wires, children: Children, folder: Path) -> None:
        """Start it."""
        sizes = ("--steps", "100000", "--slots", str(HOSTS), "--slot-size", "1")
        super().__init__(wires, children, folder, python_command("-m", (WORKLOAD, *sizes, *MODEL)))
        self._wires = wires

    @property
    def step(self) -> int:
        return max((e["step"] for e in self.events if e["kind"] == "commit"), default=0)

    @property
    def measured(self) -> bool:
        return any(e["kind"] == "probed" for e in self.events)

    def traffic(self) -> dict[Way, int]:
        """Bytes that training sends each way in some steps from now: which ring it goes round."""
        before = {way: self._wires.carried(*way) for way in self._ways()}
        last = self.step + STEPS_WATCHED
        self.until("some more steps", START_S, lambda: self.step >= last)
        return {way: self._wires.carried(*way) - nbytes for way, nbytes in before.items()}

    def _ways(self) -> Iterable[Way]:
        return ((a, b) for a in range(HOSTS) for b in range(HOSTS) if a != b)


def fault(scenario: str, run: Run) -> tuple[list[Way], list[object] | None]:
    """What to make slow, and what then has to be named."""
    traffic = run.traffic()
    a, b = max(traffic, key=traffic.__getitem__)
    others = [host for host in range(HOSTS) if host != a]
    match scenario:
        case "link":
            return [(a, b), (b, a)], ["link", min(a, b), max(a, b)]
        case "direction":
            return [(a, b)], ["direction", a, b]
        case "egress":
            return [(a, other) for other in others], ["egress", a, None]
        case "ingress":
            return [(o, b) for o in range(HOSTS) if o != b], ["ingress", b, None]
        case "unused":
            least = min(traffic, key=lambda way: traffic[way] + traffic[way[::-1]])
            # Where all send to all none is unused, and the slow one is to be named.
            used = traffic[least] > traffic[a, b] / 2
            a, b = sorted(least)
            return [(a, b), (b, a)], ["link", a, b] if used else None
        case _:
            return [], None


SCENARIOS = ("clean", "link", "direction", "egress", "ingress", "unused")


def one(scenario: str, folder: Path) -> Found:
    """One run. Raises JobFailed."""
    folder.mkdir()
    (folder / "events").mkdir()
    with Wires(HOSTS, MBIT) as wires, Children(folder) as children:
        run = Run(wires, children, folder)
        run.until(
            "the paths are measured", START_S, lambda: run.measured and run.step >= STEPS_BEFORE
        )
        ways, wanted = fault(scenario, run)
        begin = time.monotonic()
        for here, there in ways:
            wires.limit(here, there, MBIT // TIMES)
        seconds = LISTEN_S if wanted is None else WAIT_S
        run.listen(seconds, lambda: wanted is not None and wanted in names(run.events, begin))
        end = time.monotonic()
        run.lead.send_signal(signal.SIGTERM)
        run.listen(5.0, lambda: run.lead.poll() is not None)
        return judged(scenario, wanted, run.events, begin, end)


def names(events: Iterable[dict[str, Any]], since: float = 0.0) -> list[list[object]]:
    """Where, place and peer of every verdict on communication."""
    return [
        [e["evidence"].get("where"), e["evidence"].get("place"), e["evidence"].get("peer_place")]
        for e in events
        if e["kind"] == "verdict" and e["fault"] in ("slow-comm", "hang-comm") and e["mono"] > since
    ]


def judged(
    scenario: str,
    wanted: list[object] | None,
    events: list[dict[str, Any]],
    begin: float,
    end: float,
) -> Found:
    """What came of a run, from its events; pure."""
    events = sorted((e for e in events if e["mono"] <= end), key=lambda e: float(e["mono"]))
    said = names(events)
    right = said == ([] if wanted is None else [wanted])
    word = next(
        (
            e
            for e in events
            if e["kind"] == "verdict" and e["mono"] > begin and names([e]) == [wanted]
        ),
        None,
    )
    found = Found(
        scenario=scenario, wanted=wanted, said=said, right=right,
        step_s=gap(events, 0.0, begin), slow_step_s=gap(events, begin, end),
    )  # fmt: skip
    if word is None:
        return found
    probe_s = float(word["evidence"]["probe_s"])
    until = word["mono"] - probe_s
    steps = {e["step"] for e in events if e["kind"] == "commit" and begin < e["mono"] <= until}
    return Found(
        **{
            **asdict(found),
            "steps": len(steps),
            "probe_s": probe_s,
            "named_s": word["mono"] - begin,
        }
    )


def gap(events: Iterable[dict[str, Any]], begin: float, end: float) -> float | None:
    """The median time between two commits of seat 0."""
    at = [e["mono"] for e in events if e["kind"] == "commit" and e["seat"] == 0]
    at = [t for t in at if begin < t <= end]
    return percentile([b - a for a, b in itertools.pairwise(at)], 50)


def main(argv: list[str]) -> int:
    """Run every scenario and report."""
    arguments = parser(__doc__)
    arguments.add_argument("--runs", type=int, help="of each scenario")
    arguments.add_argument("--only", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    options = arguments.parse_args(argv)
    if os.geteuid() or not Wires.available():
        say("network namespaces need root, ip and tc: nothing was measured")
        return 0
    runs, found, problems = options.runs or (1 if options.quick else 5), list[Found](), list[str]()
    with scratch("slow-paths") as folder:
        for number in range(runs):
            for scenario in options.only:
                try:
                    one_found = one(scenario, folder / f"{scenario}-{number}")
                except JobFailed as error:
                    problems.append(f"{scenario}: {error}")
                    continue
                found.append(one_found)
                say(f"{scenario}: {'right' if one_found.right else 'WRONG'}, said {one_found.said}")
    sweep(Path("/dev/shm"))  # of agents that were ended before they could
    return finish(report(found, problems, options), options)


def report(found: list[Found], problems: list[str], options: argparse.Namespace) -> Report:
    """The figures of all runs; pure."""
    faulty = [f for f in found if f.wanted is not None]
    quiet = [f for f in found if f.wanted is None]
    named = [f for f in faulty if f.steps is not None]
    figures = [
        Figure(
            name=f"named right, {scenario} {TIMES}x slower",
            value=share(f.right for f in found if f.scenario == scenario),
            unit="of runs", at_least=0.95,
            against=f"{sum(f.scenario == scenario for f in found)} runs",
        )
        for scenario in options.only
    ]  # fmt: skip
    figures += [
        Figure(
            name="wrongly named", value=share(bool(f.said) for f in quiet), unit="of runs",
            at_most=0.0, against=f"{len(quiet)} runs in which nothing that is used is slow",
        ),
        Figure(
            name="steps until the probe begins, 95th percentile",
            value=percentile([f.steps for f in named if f.steps is not None], 95),
            unit="steps", at_most=10,
        ),
        Figure(
            name="the probe, 95th percentile",
            value=percentile([f.probe_s for f in named if f.probe_s is not None], 95), unit="s",
        ),
        Figure(
            name="fault to name, 95th percentile",
            value=percentile([f.named_s for f in named if f.named_s is not None], 95), unit="s",
        ),
    ]  # fmt: skip
    return Report(
        name="slow_paths",
        figures=figures,
        computed={"runs": f"{len(found)} of {HOSTS} hosts at {MBIT} Mbit/s"},
        problems=problems,
        notes=[
            "a wire in each direction is a token bucket (`tc tbf`); hosts share this machine's cores",
            "nothing is slow in `clean`, nor, where training leaves a wire out, in `unused`",
        ],
        options=vars(options),
        samples=[asdict(f) for f in found],
    )


def share(holds: Iterable[bool]) -> float | None:
    """How many of them hold; None of none."""
    each = list(holds)
    return sum(each) / len(each) if each else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
