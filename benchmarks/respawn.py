"""From the start of a respawned rank's process to its full participation; and what others feel.

A rank of N is killed; its replacement starts beside N-1 survivors that train on. Its time runs
from the agent's `spawn` event to its first commit as a member. It is divided by what a fresh
process needs for `import torch`, building the model and wrapping it in DDP and no more
(`setup_probe`), measured in the same run under the same load: a job of N-1 ranks with the same
global batch trains beside it, as the survivors do. The two kinds of job alternate in rounds;
the figure is the ratio of the medians.

The survivors' longest step while the newcomer joins: the longest interval between two commits
of one survivor, from its first commit after the repair to its commit of the step that is the
newcomer's first. The interval that the kill fell into is repair (`repair`), not join. It is
divided by the median step of the whole job, and, for judging the
join apart from the load of a starting process on few cores, by the survivors' own median in the
same time.

    python -m benchmarks.respawn [--quick] [--json] [--save]
"""

import argparse
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from subprocess import Popen

from benchmarks.children import Children, python
from benchmarks.faults import median_step, plan_faults, steps_for
from benchmarks.figures import Figure, Report, as_samples, finish, parser, percentile, say
from benchmarks.jobs import Event, Job, params_of, scratch
from ftkit.core.fault_plan import Kind
from ftkit.core.trace import read_run
from ftkit.launch.engine import Engine

RATIO, LONGEST = 1.2, 2.0

#: Commits of the probes' job before the first probe: its ranks are through with starting.
SETTLED_STEPS = 10

#: A job that only keeps a probe company has more steps than it will play, and is ended.
ENDLESS_STEPS = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Respawn:
    """One replacement, in seconds; ratios to two medians."""

    seat: int
    joined_s: float
    """From `spawn` to its first commit."""
    longest_s: float
    """The longest step of a survivor meanwhile, the repaired one left out."""
    meanwhile_s: float
    """The survivors' median step meanwhile."""
    median_s: float
    """The median step of the whole world, undisturbed by anything."""


@dataclass(slots=True)
class Prober:
    """Starts probes one after another beside a running job, then ends the job."""

    children: Children
    run_dir: Path
    count: int
    model: tuple[str, ...]
    started: list[float] = field(default_factory=list)
    _child: Popen[bytes] | None = None

    def poll(self, engine: Engine) -> None:
        """Called while the job runs."""
        if self._child is not None and self._child.poll() is None:
            return
        if len(self.started) == self.count:
            engine.interrupt()
            return
        if not self.started and not self._settled():
            return
        self._child = self.children.start(
            python("-m", "benchmarks.setup_probe", *self.model), {"OMP_NUM_THREADS": "1"}
        )
        self.started.append(time.monotonic())

    def _settled(self) -> bool:
        steps = [e["step"] for e in read_run(self.run_dir) if e["kind"] == "commit"]
        return max(steps, default=0) >= SETTLED_STEPS


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print. Returns the exit code."""
    options = _options(argv)
    rng = random.Random(options.seed)
    respawns, fresh = list[Respawn](), list[float]()
    digests = set[str]()
    with scratch("respawn") as folder:
        for number in range(options.rounds):
            found, params = run_kills(options, rng, folder / f"kills-{number}")
            respawns += found
            digests |= params
            fresh += run_probes(options, folder / f"probes-{number}")
            say(f"round {number}: {len(respawns)} replacements, {len(fresh)} fresh processes")
    return finish(report(respawns, fresh, digests, vars(options)), options)


def run_kills(
    options: argparse.Namespace, rng: random.Random, run_dir: Path
) -> tuple[list[Respawn], set[str]]:
    """A job in which one rank after another is killed and replaced. Blocks."""
    nproc, gap = options.nproc, options.gap
    kills = min(options.kills, nproc)
    job = Job(nproc=nproc, steps=steps_for(kills, gap), model=_model(options))
    faults = plan_faults(rng, [Kind.KILL], nproc=nproc, count=kills, gap=gap)
    events = job.run(run_dir, faults=faults)
    return respawns_of(events, nproc=nproc), params_of(events)


def run_probes(options: argparse.Namespace, run_dir: Path) -> list[float]:
    """Fresh processes beside a job of one rank less. Blocks. Seconds of each."""
    (run_dir / "children").mkdir(parents=True)
    job = Job(nproc=options.nproc - 1, steps=ENDLESS_STEPS, model=_model(options))
    with Children(run_dir / "children") as children:
        preset = () if options.model is None else (options.model,)
        prober = Prober(children, run_dir, min(options.kills, options.nproc), preset)
        job.run(run_dir, on_poll=prober.poll, interrupts=True)
        told = children.wait(timeout_s=60)
    return [t["wrapped"] - start for t, start in zip(told, prober.started, strict=True)]


def respawns_of(events: Sequence[Event], *, nproc: int) -> list[Respawn]:
    """Every replacement that came to commit a step; pure.

    Left out is one whose world was not whole but for it: another was being replaced too.
    """
    commits = [e for e in events if e["kind"] == "commit"]
    first = dict[int, Event]()
    for e in sorted(commits, key=lambda e: float(e["mono"])):
        first.setdefault(int(e["member"]), e)
    median_s = median_step(events, size=nproc)
    faults = [e for e in events if e["kind"] == "drill"]
    found = list[Respawn]()
    for spawn in (e for e in events if e["kind"] == "spawn" and e["member"] >= nproc):
        member, start = int(spawn["member"]), float(spawn["mono"])
        if member not in first:
            continue
        joined = first[member]
        end = float(joined["mono"])
        before = [e for e in faults if e["mono"] <= start]
        if not before or any(start < e["mono"] < end for e in faults):
            continue
        struck = max(
            int(e["generation"]) for e in commits if e["mono"] <= float(before[-1]["mono"])
        )
        mine = [
            e
            for e in commits
            if e["member"] != member and e["generation"] > struck and e["step"] <= joined["step"]
        ]
        steps = [
            later - sooner
            for survivor in {int(e["member"]) for e in mine}
            for sooner, later in _intervals(mine, survivor)
        ]
        if not steps:
            continue
        found.append(
            Respawn(
                seat=int(spawn["seat"]),
                joined_s=end - start,
                longest_s=max(steps),
                meanwhile_s=statistics.median(steps),
                median_s=median_s,
            )
        )
    return found


def _intervals(commits: Sequence[Event], member: int) -> list[tuple[float, float]]:
    times = sorted(float(e["mono"]) for e in commits if e["member"] == member)
    return list(pairwise(times))


def report(
    respawns: Sequence[Respawn],
    fresh: Sequence[float],
    digests: set[str],
    options: dict[str, object],
) -> Report:
    """The ratios; pure."""
    problems = []
    if len(digests) != 1:
        problems.append(f"the jobs ended in {len(digests)} different sets of parameters")
    if not respawns or not fresh:
        problems.append(f"{len(respawns)} replacements and {len(fresh)} fresh processes: no ratio")
    joined = [r.joined_s for r in respawns]
    ratio = statistics.median(joined) / statistics.median(fresh) if joined and fresh else None
    longest = [r.longest_s / r.median_s for r in respawns]
    return Report(
        name="respawn",
        figures=[
            Figure(
                name="process start to full participation / torch + model + DDP in a fresh process",
                value=ratio,
                unit="x",
                at_most=RATIO,
                against="torchft: 1.9-3.1 s to rejoin",
            ),
            Figure(name="process start to full participation, p50", value=_mid(joined), unit="s"),
            Figure(name="fresh process, p50", value=_mid(fresh), unit="s"),
            Figure(
                name="survivors' longest step in a join / median step, p50",
                value=_mid(longest),
                unit="x",
                at_most=LONGEST,
            ),
            Figure(name="the same, p95", value=percentile(longest, 95), unit="x", at_most=LONGEST),
            Figure(
                name="the same / their own median meanwhile, p50",
                value=_mid([r.longest_s / r.meanwhile_s for r in respawns]),
                unit="x",
            ),
        ],
        computed={"parameters": " ".join(sorted(digests))},
        problems=problems,
        options=options,
        samples={"respawns": as_samples(respawns), "fresh_s": list(fresh)},
    )


def _mid(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _model(options: argparse.Namespace) -> tuple[str, ...]:
    return () if options.model is None else ("--params", options.model)


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--nproc", type=int, default=3, help="ranks")
    made.add_argument("--rounds", type=int, help="pairs of jobs (5; quick: 1)")
    made.add_argument("--kills", type=int, default=3, help="replacements of a job, at most --nproc")
    made.add_argument("--gap", type=int, default=160, help="steps between two kills of a job")
    made.add_argument("--model", choices=["4m", "25m"], help="a preset instead of a small model")
    made.add_argument("--seed", type=int, default=0, help="decides seats, phases and moments")
    options = made.parse_args(argv)
    if options.nproc < 2:
        made.error(f"--nproc must be at least 2, got {options.nproc}: somebody has to survive")
    if options.rounds is None:
        options.rounds = 1 if options.quick else 5
    return options


if __name__ == "__main__":
    sys.exit(main())
