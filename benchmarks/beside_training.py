"""Whole jobs on two hosts joined by a limited link: what ftkit's own bytes cost training.

Computing is emulated (layers that sleep), so that the link and not the processor is the limit. Five
jobs at each rate, in turns, each timed by the mean of its steps once it has settled::

    plain       DDP over gloo
    waiting     the same with a hook that waits for each bucket, and a vote (what torchft does)
    ftkit       DDP through ftkit: a vote, and a snapshot in memory, every step
    parity      the same with a copy of each node's snapshots on the other, sent as fast as it goes
    governed    the same, by `--max-slowdown`

"Windows used" are the bytes that parity sends while a round is running, over what the link could
carry meanwhile beside training's own (those of the `ftkit` job's steps). Needs root.

    python -m benchmarks.beside_training [--mbit 1000 2000] [--quick] [--json] [--save]
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.children import Children, free_port, gloo_environment, python
from benchmarks.figures import Figure, Report, finish, parser, say
from benchmarks.hosts_job import HostsJob
from benchmarks.jobs import JobFailed, ended_by_sigterm, scratch
from benchmarks.links import Links
from ftkit.launch.arenas import sweep

RANKS = 2
WAYS = ("plain", "waiting", "ftkit", "parity", "governed")

#: Steps that are not timed: buckets are rebuilt, windows learnt.
SETTLE = 15
TIMEOUT_S = 180.0

MAX_SLOWDOWN = 0.01
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "ftkit": {},
    "parity": {"parity": "1+1"},
    "governed": {"parity": "1+1", "max_slowdown": MAX_SLOWDOWN},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """One job."""

    way: str
    step_s: float
    """Mean of the settled steps."""
    sent: int
    """Bytes that left the first host in a settled step, on average."""
    rounds: int = 0
    """Of parity, in the settled steps."""
    round_bytes: int = 0
    """Of parity that a node sent in them."""
    round_s: float = 0.0
    """They took, together."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print. Returns the exit code."""
    made = parser(__doc__)
    made.add_argument("--mbit", type=int, nargs="+", default=[1000, 2000], help="rates")
    made.add_argument("--rounds", type=int, help="jobs of each way (3; quick: 1)")
    made.add_argument("--steps", type=int, help="timed, of a job (60; quick: 15)")
    options = made.parse_args(argv)
    if not Links.possible():
        say("network namespaces need root, ip and tc: nothing was measured")
        return 0
    rounds = options.rounds or (1 if options.quick else 3)
    steps = options.steps or (15 if options.quick else 60)
    found: dict[int, list[Ran]] = {}
    problems = list[str]()
    with ended_by_sigterm(), scratch("beside") as folder:
        for mbit in options.mbit:
            for number in range(rounds):
                for way in WAYS:
                    try:
                        ran = run(way, mbit, steps, folder / f"{mbit}-{way}-{number}")
                    except JobFailed as failed:
                        problems.append(f"{way}, {mbit} Mbit: {failed}")
                        continue
                    say(f"{mbit} Mbit: {ran}")
                    found.setdefault(mbit, []).append(ran)
    sweep(Path("/dev/shm"))  # of agents that were ended before they could
    return finish(report(found, problems, options), options)


def run(way: str, mbit: int, steps: int, folder: Path) -> Ran:
    """One job, from its start to its end. Blocks. JobFailed."""
    (folder / "events").mkdir(parents=True)
    total = SETTLE + steps
    job_of = "ftkit" if way in SETTINGS else way
    command = python("-m", "benchmarks.beside_rank", job_of, str(total))
    with Links(RANKS, f"{mbit}mbit") as links, Children(folder) as children:
        if way not in SETTINGS:
            port = free_port()
            for rank in range(RANKS):
                env = gloo_environment(rank, RANKS, port) | {
                    "MASTER_ADDR": links.host(0),
                    "GLOO_SOCKET_IFNAME": links.device(rank),
                }
                children.start(links.command(rank, command), env)
            times = children.wait(TIMEOUT_S)[0]["times"]
            return Ran(way=way, step_s=(times[-1] - times[SETTLE - 1]) / steps, sent=0)
        job = HostsJob(links, children, folder, command, SETTINGS[way])

        def reached(step: int) -> bool:
            return any(e["kind"] == "commit" and e["step"] >= step for e in job.events)

        job.until("training has settled", TIMEOUT_S, lambda: reached(SETTLE))
        before, sent = _step(job), links.carried(0)
        job.until("the last step", TIMEOUT_S, lambda: reached(total - 1))
        after, sent = _step(job), links.carried(0) - sent
        job.listen(10.0, lambda: job.lead.poll() is not None)
        return read(way, job.events, steps=after - before, sent=sent)


def _step(job: HostsJob) -> int:
    return max(int(e["step"]) for e in job.events if e["kind"] == "commit")


def read(way: str, events: Sequence[Mapping[str, Any]], *, steps: int, sent: int) -> Ran:
    """What a job's events say; pure.

    Args:
      way: of the job.
      events: all.
      steps: in which `sent` bytes left the first host.
      sent: likewise.
    """
    commits = sorted(
        (int(e["step"]), float(e["mono"]))
        for e in events
        if e["kind"] == "commit" and e["seat"] == 0 and e["step"] >= SETTLE
    )
    (first, begin), (last, end) = commits[0], commits[-1]
    rounds = [e for e in events if e["kind"] == "parity" and begin < e["mono"] <= end]
    return Ran(
        way=way,
        step_s=(end - begin) / (last - first),
        sent=sent // max(1, steps),
        rounds=len(rounds),
        round_bytes=sum(int(e["bytes"]) for e in rounds) // RANKS,
        round_s=sum(float(e["seconds"]) for e in rounds),
    )


def figures_of(mbit: int, ran: Sequence[Ran]) -> list[Figure]:
    """What the jobs at one rate say; pure."""
    ways = {way: [r for r in ran if r.way == way] for way in WAYS}
    step = {way: median(r.step_s for r in all_) for way, all_ in ways.items() if all_}
    told = ", ".join(f"{way} {s * 1e3:.1f}" for way, s in step.items()) + " ms a step"
    link = f"{mbit} Mbit"

    def ratio(a: str, b: str) -> float | None:
        return step[a] / step[b] if a in step and b in step else None

    def slower(way: str) -> float | None:
        over = ratio(way, "ftkit")
        return None if over is None else 100 * (over - 1)

    used = None
    governed = [r for r in ways["governed"] if r.round_s > 0]
    if governed and "ftkit" in step:
        busy = median(r.sent for r in ways["ftkit"]) / (mbit * 125e3) / step["ftkit"]
        could = max(1e-9, 1 - busy) * mbit * 125e3
        used = 100 * median(r.round_bytes / r.round_s for r in governed) / could
    return [
        Figure(name=f"DDP through ftkit / plain, {link}", value=ratio("ftkit", "plain"), unit="x", at_most=1.02, against=told),
        Figure(name=f"a hook that waits / through ftkit, {link}", value=ratio("waiting", "ftkit"), unit="x", at_least=1.35, against=told),
        Figure(name=f"parity, governed: slow-down, {link}", value=slower("governed"), unit="%", at_most=1.5, against=told),
        Figure(name=f"parity, as fast as it goes: slow-down, {link}", value=slower("parity"), unit="%", against=told),
        Figure(name=f"parity, governed: of the idle windows used, {link}", value=used, unit="%", at_least=70),
    ]  # fmt: skip


def report(
    found: Mapping[int, Sequence[Ran]], problems: Sequence[str], options: argparse.Namespace
) -> Report:
    """The figures of all rates; pure."""
    return Report(
        name="beside_training",
        figures=[figure for mbit, ran in found.items() for figure in figures_of(mbit, ran)],
        computed={"jobs": str(sum(map(len, found.values())))},
        problems=list(problems),
        options=vars(options),
        samples={str(mbit): [asdict(r) for r in ran] for mbit, ran in found.items()},
    )


if __name__ == "__main__":
    sys.exit(main())
