"""Ray on three hosts, one of which dies: from then to the survivors' next committed step.

Each host is a network namespace with an address and a raylet of its own; `ftkit run --engine ray` runs
on the first, with a rank on each. Again and again everything on one of the other two is ended by SIGKILL,
raylet, agent and rank; the moment before the first of these signals is time 0. The host then gets a new
raylet, and the next one is killed when its rank trains again. The machine lives, so its kernel answers
for the dead; what a machine does that loses its power is seen with `--cuts`, where the host's link is
cut and nobody says anything. For that the wait is what `--max-stall` says: a node is lost after twice that.

Beside the job a driver of Ray asks it ten times a second which nodes are alive: the column "against".
All ranks have to end with the parameters of a job that nobody disturbed, bit for bit. Needs root.

    python -m benchmarks.ray_nodes [--kills 20] [--cuts 3] [--quick] [--json] [--save]
"""

import argparse
import itertools
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.children import python
from benchmarks.figures import Figure, Report, as_samples, finish, parser, percentile, say
from benchmarks.hosts import Hosts
from benchmarks.jobs import Event, Job, JobFailed, params_of, scratch
from benchmarks.ray_hosts import RayHosts
from benchmarks.ray_rank import PACE
from ftkit.launch.event_tail import EventTail

NODES = 3
#: The goal, in seconds.
P95_S = 2.0
#: Steps of a job for each fault, which it has to survive before they are through.
STEPS = 150
#: Seconds that a rank sleeps a step: while a fault is looked at, while its host comes back, at the end.
USUAL_S, AWAY_S, LAST_S = 0.05, 0.5, 0.0
#: Of undisturbed training before each fault.
SETTLED_S = 3.0
LIMIT_S = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """One host that was lost, and what followed, in seconds after it."""

    seat: int
    first_s: float
    """Until the first survivor had committed a step in a newer world."""
    repair_s: float
    """Until the last one had."""
    noticed_s: float | None
    """Until Ray said that the node is dead."""
    back_s: float
    """Until the lost seat committed a step again; the host comes back only after `repair_s`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """A job that has ended."""

    losses: Sequence[Loss]
    params: set[str]
    finals: int


class Watched:
    """A job on the cluster, followed by its events."""

    def __init__(self, cluster: RayHosts, folder: Path, *, steps: int, max_stall_s: float) -> None:
        """Start it. `folder` exists."""
        self._cluster = cluster
        self._pace = folder / "pace"
        self.pace(USUAL_S)
        run = folder / "run"
        self._tail = EventTail(run)
        self.events = list[Event]()
        job = Job(nproc=1, steps=steps, slots=6)
        command = ("-m", "ftkit.launch.cli", "run", "--engine", "ray", "--nodes", str(NODES))
        options = ("--max-stall", f"{max_stall_s:g}", "--max-restarts", "10000")
        words = job.command[job.command.index("benchmarks.training") + 1 :]
        self._process = cluster.start(
            0,
            python(*command, *options, "--run-dir", str(run), "-m", "benchmarks.ray_rank", *words),
            {PACE: str(self._pace)},
        )

    def pace(self, seconds: float) -> None:
        part = self._pace.with_suffix(".part")
        part.write_text(str(seconds))
        part.replace(self._pace)

    def until(self, what: str, done: Callable[[], bool], limit_s: float = LIMIT_S) -> None:
        """Read events until `done()`. JobFailed when that takes too long, or the job ends."""
        end = time.monotonic() + limit_s
        while not done():
            if self._process.poll() is not None:
                raise JobFailed(f"the job ended with {self._process.returncode}: {what}")
            if time.monotonic() > end:
                raise JobFailed(f"after {limit_s:g} s still not: {what}")
            time.sleep(0.02)
            self.events += self._tail.poll()

    def commits(self, since: float) -> dict[int, float]:
        """Seat -> when it first committed a step after `since`."""
        found = dict[int, float]()
        for e in self.events:
            if e["kind"] == "commit" and e["mono"] > since:
                found.setdefault(e["seat"], e["mono"])
        return found

    def newer(self, since: float) -> dict[int, float]:
        """Seat -> when it first committed in a world newer than the one of `since`."""
        before = max(e["generation"] for e in self.events if _is_commit(e) and e["mono"] <= since)
        found = dict[int, float]()
        for e in self.events:
            if _is_commit(e) and e["generation"] > before:
                found.setdefault(e["seat"], e["mono"])
        return found

    def whole(self, since: float) -> None:
        """Wait until all seats train."""
        self.until("all seats train", lambda: len(self.commits(since)) == NODES)

    def go_on(self, since: float) -> None:
        """Wait until all but one train in a newer world."""
        self.until("the survivors go on", lambda: len(self.newer(since)) >= NODES - 1)

    def back(self, seat: int, since: float) -> None:
        """Wait until `seat` trains again."""
        self.until(f"seat {seat} is back", lambda: seat in self.commits(since))

    def listen(self, seconds: float) -> None:
        """Read events for so long."""
        end = time.monotonic() + seconds
        self.until("time passes", lambda: time.monotonic() > end)

    def end(self) -> None:
        """Let it come to its end."""
        self.pace(LAST_S)
        code = self._process.wait(LIMIT_S)
        self.events += self._tail.poll()
        if code:
            raise JobFailed(f"the job ended with {code}")


def strike(
    cluster: RayHosts, folder: Path, *, cut: bool, count: int, max_stall_s: float, watch: Path
) -> Done:
    """One job that loses `count` hosts, one after another."""
    folder.mkdir()
    job = Watched(cluster, folder, steps=count * STEPS, max_stall_s=max_stall_s)
    job.whole(0.0)
    losses = list[Loss]()
    for number in range(count):
        job.listen(SETTLED_S)
        job.whole(time.monotonic() - 0.5)
        host = 1 + number % (NODES - 1)
        pids = set(cluster.hosts.pids(host))
        (seat,) = {e["seat"] for e in job.events if e["kind"] == "spawn" and e["pid"] in pids}
        at = time.monotonic()
        if cut:
            cluster.hosts.cut(host)
        else:
            at = cluster.kill(host)
        job.go_on(at)
        survivors = [mono - at for s, mono in job.newer(at).items() if s != seat]
        job.pace(AWAY_S)
        if cut:
            cluster.kill(host)
            cluster.hosts.cut(host, whole=True)
        cluster.join(host)
        joined = time.monotonic()
        job.back(seat, joined)
        job.pace(USUAL_S)
        losses.append(
            Loss(
                seat=seat,
                first_s=min(survivors),
                repair_s=max(survivors),
                noticed_s=_noticed(watch, at),
                back_s=job.commits(joined)[seat] - at,
            )
        )
        say(f"{'cut' if cut else 'kill'} {number + 1}: {losses[-1]}")
    job.end()
    finals = [e for e in job.events if e["kind"] == "final"]
    return Done(losses=losses, params=params_of(finals), finals=len(finals))


def report(done: dict[str, Done], params: dict[str, str], options: dict[str, object]) -> Report:
    """The figures; pure."""
    figures, problems = list[Figure](), list[str]()
    for name, d in done.items():
        repairs = [loss.repair_s for loss in d.losses]
        noticed = [loss.noticed_s for loss in d.losses if loss.noticed_s is not None]
        told = percentile(noticed, 50)
        ray = "" if told is None else f"Ray itself notices after {told:.3g} s (p50)"
        goal = P95_S if name == "node killed" else None
        figures += [
            Figure(name=f"{name}: times", value=len(repairs), unit=""),
            Figure(name=f"{name} to next committed step, p50", value=percentile(repairs, 50),
                   unit="s"),
            Figure(name=f"{name} to next committed step, p95", value=percentile(repairs, 95),
                   unit="s", at_most=goal, against=ray),
            Figure(name=f"{name} to Ray's notice, p95", value=percentile(noticed, 95), unit="s"),
            Figure(name=f"{name} to its seat training again, p50",
                   value=percentile([loss.back_s for loss in d.losses], 50), unit="s"),
        ]  # fmt: skip
        if d.finals != NODES or d.params != {params[name]}:
            problems.append(f"{name}: {d.finals} ranks ended with {d.params}, not {params[name]}")
    return Report(
        name="ray_nodes",
        figures=figures,
        computed={f"parameters, {name}": digest for name, digest in params.items()},
        problems=problems,
        options=options,
        samples={name: as_samples(d.losses) for name, d in done.items()},
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print. Returns the exit code."""
    options = _options(argv)
    series = {
        "node killed": (False, options.kills, 30.0),
        "link cut": (True, options.cuts, options.max_stall),
    }
    done, params = dict[str, Done](), dict[str, str]()
    with scratch("rays") as folder:
        with RayHosts(NODES, folder) as cluster:
            watch = cluster.start(0, python("-m", "benchmarks.ray_watch"))
            for number, (name, (cut, count, max_stall_s)) in enumerate(series.items()):
                if count:
                    done[name] = strike(
                        cluster,
                        folder / f"job-{number}",
                        cut=cut,
                        count=count,
                        max_stall_s=max_stall_s,
                        watch=folder / "child-0.out",
                    )
            watch.kill()
        for name, d in done.items():
            job = Job(nproc=NODES, steps=len(d.losses) * STEPS, slots=6)
            (params[name],) = params_of(job.run(folder / "undisturbed"))
            shutil.rmtree(folder / "undisturbed")
    return finish(report(done, params, vars(options)), options)


def _is_commit(event: Event) -> bool:
    return bool(event["kind"] == "commit")


def _noticed(watch: Path, at: float) -> float | None:
    """How long after `at` Ray called a node dead."""
    # Ray says that a node is dead in the midst of it, too.
    lines = [line for line in watch.read_text().splitlines() if line.startswith("{")]
    seen = [json.loads(line) for line in lines]
    fell = [b["mono"] for a, b in itertools.pairwise(seen) if b["alive"] < a["alive"]]
    return min((mono - at for mono in fell if mono > at), default=None)


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--kills", type=int, default=20, help="hosts that are killed")
    made.add_argument("--cuts", type=int, default=3, help="hosts whose link is cut")
    made.add_argument("--max-stall", type=float, default=5.0, help="of the job whose links are cut")
    options = made.parse_args(argv)
    if options.quick:
        options.kills, options.cuts = min(options.kills, 2), min(options.cuts, 1)
    if not Hosts.available():
        made.error("network namespaces cannot be made here: it takes root, and `ip`")
    return options


if __name__ == "__main__":
    sys.exit(main())
