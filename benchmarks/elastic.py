"""A sharded job that loses a rank: how soon it goes on, what it moves, and what sameness costs.

Four ranks train an FSDP2 model; one kills itself. ::

    repair_s     from SIGKILL until the last of the three survivors had committed its next step
    replay_s     of that, until the last survivor began that step: the repair without the repeated step
    group_s      of that, from the order to go on until the smaller group stood (the last survivor)
    restart_s    the same script under torchrun, which starts all anew and loads a DCP checkpoint of
                 the step before, until the last rank had committed its next step
    init_s       gloo's group of four destroyed and made anew, no rank lost, everything else up

The bytes that ranks read from others' arenas, 4 -> 3 and 3 -> 4, are divided by what they must read:
the elements of their new shards that were not in their old ones. Steps are timed by alternating
three ways in the same processes (`elastic_steps`). Every job must end with the parameters of the
undisturbed one.

    python -m benchmarks.elastic [--quick] [--json] [--save]
"""

import argparse
import random
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.children import Children, free_port, gloo_environment, python
from benchmarks.figures import Figure, Report, as_samples, finish, parser, percentile, say
from benchmarks.jobs import Event, Job, JobFailed, params_of, scratch
from ftkit.core.fault_plan import Kind, PlannedFault, Point
from ftkit.launch.workload.gpt import GPT
from ftkit.launch.workload.train import parse

RANKS = 4
REPAIR_S, GROUP_S, OF_PEER = 1.5, 0.1, 0.1
BYTES, SYNCED, ACCUMULATED = 1.1, 1.0, 1.15

#: A parameter and AdamW's two moments.
COPIES = 3

STEPS, KILL_AT, TIMEOUT_S = 40, 8, 300.0

#: Of the job that loses a rank: a micro-batch a rank, so that a step is some part of a second on two
#: cores, where all ranks' bytes cross the same memory.
LOSS_SIZES = ("--slots", str(RANKS), "--slot-size", "1", "--context", "64")


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """One rank lost, and back."""

    repair_s: float
    replay_s: float
    group_s: float
    build_s: float
    restore_s: float
    shrink_bytes: int
    grow_bytes: int
    replayed: int
    """Committed steps played again."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print. Returns the exit code."""
    options = _options(argv)
    rng = random.Random(options.seed)
    model = tuple(options.model.split())
    with scratch("elastic") as folder:
        job = Job(
            nproc=RANKS,
            steps=STEPS,
            slots=options.slots,
            model=(*model, *LOSS_SIZES, "--clip", "1.0", "--sharded"),
        )
        params = params_of(job.run(folder / "reference"))
        losses, problems = list[Loss](), list[str]()
        for run in range(options.runs):
            events = job.run(folder / f"loss-{run}", faults=[fault(rng)])
            if params_of(events) != params:
                problems.append(f"run {run} ended with other parameters than the undisturbed one")
            losses.append(read_loss(events))
            say(f"loss {run}: {losses[-1]}")
        restarts = [
            _restart(folder, run, options.slots, (*model, *LOSS_SIZES))
            for run in range(options.runs)
        ]
        steps, renewals = _steps(folder, options.rounds, options.slots, model)
    shapes = [tuple(p.shape) for p in GPT(parse(model).model, seed=0).parameters()]
    return finish(
        report(losses, restarts, steps, renewals, shapes, problems, params, vars(options)), options
    )


def report(
    losses: Sequence[Loss],
    restarts: Sequence[float],
    steps: dict[str, list[float]],
    renewals: Sequence[float],
    shapes: Sequence[tuple[int, ...]],
    problems: Sequence[str],
    params: Iterable[str],
    options: dict[str, object],
) -> Report:
    """The figures; pure."""
    repair = statistics.median(x.repair_s for x in losses)
    group = statistics.median(x.group_s for x in losses)
    least = {name: min(values) for name, values in steps.items()}

    def moved(values: Iterable[int], before: int, after: int) -> float:
        return statistics.median(values) / must_move(shapes, before, after)

    figures = [
        Figure(name="repair_s p50", value=repair, unit="s", at_most=REPAIR_S),
        Figure(
            name="repair_s / restart_s",
            value=repair / statistics.median(restarts),
            unit="",
            at_most=OF_PEER,
            against=f"torchrun and DCP: {statistics.median(restarts):.3g} s",
        ),
        Figure(
            name="repair_s worst", value=percentile([x.repair_s for x in losses], 100), unit="s"
        ),
        Figure(name="group_s p50", value=group, unit="s", at_most=GROUP_S),
        Figure(
            name="group_s / init_s",
            value=group / statistics.median(renewals),
            unit="",
            at_most=OF_PEER,
            against=f"gloo, destroyed and made anew: {statistics.median(renewals):.3g} s",
        ),
        Figure(name="replay_s p50", value=statistics.median(x.replay_s for x in losses), unit="s"),
        Figure(name="build_s p50", value=statistics.median(x.build_s for x in losses), unit="s"),
        Figure(
            name="restore_s p50", value=statistics.median(x.restore_s for x in losses), unit="s"
        ),
        Figure(
            name="bytes moved 4 -> 3 / must",
            value=moved((x.shrink_bytes for x in losses), RANKS, RANKS - 1),
            unit="",
            at_most=BYTES,
        ),
        Figure(
            name="bytes moved 3 -> 4 / must",
            value=moved((x.grow_bytes for x in losses), RANKS - 1, RANKS),
            unit="",
            at_most=BYTES,
        ),
        Figure(
            name="canonical / sync every micro-batch",
            value=least["canonical"] / least["synced"],
            unit="",
            at_most=SYNCED,
            against=f"FSDP2 over gloo: {least['synced']:.3g} s",
        ),
        Figure(
            name="canonical / accumulate, then reduce",
            value=least["canonical"] / least["accumulated"],
            unit="",
            at_most=ACCUMULATED,
            against=f"FSDP2 over gloo: {least['accumulated']:.3g} s",
        ),
    ]
    return Report(
        name="elastic",
        figures=figures,
        computed={"parameters": " ".join(sorted(params))},
        problems=problems,
        notes=["the least of the alternating steps is compared: load only adds"],
        options=options,
        samples={
            "losses": as_samples(losses),
            "restarts_s": list(restarts),
            "steps_s": steps,
            "init_s": list(renewals),
        },
    )


def read_loss(events: Sequence[Event]) -> Loss:
    """What the events of a job with one loss tell; pure. JobFailed when they do not."""
    struck = next((e for e in events if e["kind"] == "drill"), None)
    if struck is None:
        raise JobFailed("the fault did not strike")
    at, lost = float(struck["mono"]), int(struck["member"])
    before = max(int(e["generation"]) for e in events if e["kind"] == "commit" and e["mono"] <= at)

    def of(kind: str, generation: int) -> list[Event]:
        found = [e for e in events if e["kind"] == kind and e.get("generation") == generation]
        if not found:
            raise JobFailed(f"no {kind} event of generation {generation}")
        return sorted(found, key=lambda e: float(e["mono"]))

    smaller = min(int(e["generation"]) for e in events if e["kind"] == "build" and e["mono"] > at)
    grown = min(
        int(e["generation"])
        for e in events
        if e["kind"] == "build" and int(e["generation"]) > smaller
    )

    def last_first(kind: str) -> float:
        first = dict[int, float]()
        for e in of(kind, smaller):
            first.setdefault(int(e["member"]), float(e["mono"]))
        return max(first.values())

    builds, restores = of("build", smaller), of("restore", smaller)
    # A build begins as the group stands, and says when it ended.
    stood = max(float(e["mono"]) - float(e["seconds"]) for e in builds)
    committed = {int(e["step"]) for e in events if e["kind"] == "commit" and e["member"] != lost
                 and e["generation"] == before}  # fmt: skip
    return Loss(
        repair_s=last_first("commit") - at,
        replay_s=last_first("attempt") - at,
        group_s=stood - float(of("resume", smaller)[-1]["mono"]),
        build_s=max(float(e["seconds"]) for e in builds),
        restore_s=max(float(e["seconds"]) for e in restores),
        shrink_bytes=sum(int(e["moved"]) for e in restores),
        grow_bytes=sum(int(e["moved"]) for e in of("restore", grown)),
        replayed=len(committed & {int(e["step"]) for e in of("commit", smaller)}),
    )


def must_move(shapes: Iterable[tuple[int, ...]], before: int, after: int) -> int:
    """Bytes of new shards that were not in the same seat's old one, over all ranks; pure.

    Rows go to ranks as `torch.chunk` cuts them. One seat, the last, is lost or filled anew.
    """
    total = 0
    for shape in shapes:
        row = 1
        for size in shape[1:]:
            row *= size
        for rank in range(after):
            new = _rows(shape[0], after, rank)
            kept = range(0)
            if rank < before:
                old = _rows(shape[0], before, rank)
                kept = range(max(new.start, old.start), min(new.stop, old.stop))
            total += (len(new) - len(kept)) * row * 4 * COPIES
    return total


def _rows(count: int, parts: int, part: int) -> range:
    size = -(-count // parts)
    return range(min(part * size, count), min((part + 1) * size, count))


def fault(rng: random.Random) -> PlannedFault:
    """The last seat is lost, so that the shards of the others move as little as can be said."""
    seat = RANKS - 1
    point = rng.choice([Point.FORWARD, Point.BACKWARD, Point.ALL_REDUCE, Point.OPTIMIZER])
    return PlannedFault(
        kind=Kind.KILL, point=point, seat=seat, member=seat, step=KILL_AT, bucket=0,
        delay_s=rng.uniform(0, 0.004), byte=0,
    )  # fmt: skip


def _sizes(slots: int, model: Sequence[str]) -> list[str]:
    return ["--slots", str(slots), "--slot-size", "2", *model]


def _restart(folder: Path, run: int, slots: int, model: Sequence[str]) -> float:
    """Seconds from the kill to the last rank's next commit, under torchrun."""
    place = folder / f"restart-{run}"
    place.mkdir()
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(RANKS), "--max-restarts", "1",
              "--standalone", "--monitor-interval", "0.1",
              "-m", "benchmarks.elastic_plain", str(place), str(KILL_AT)]  # fmt: skip
    with Children(place) as children:
        child = children.start(python(*launch, *_sizes(slots, model)), {"OMP_NUM_THREADS": "1"})
        child.wait(TIMEOUT_S)
        if child.returncode:
            raise JobFailed(f"torchrun exited with {child.returncode}\n{children.errors(0)}")
    killed = float((place / "killed").read_text())
    commits = [float((place / f"commit-1-{rank}-{KILL_AT}").read_text()) for rank in range(RANKS)]
    say(f"restart {run}: {max(commits) - killed:.2f} s")
    return max(commits) - killed


def _steps(
    folder: Path, rounds: int, slots: int, model: Sequence[str]
) -> tuple[dict[str, list[float]], list[float]]:
    """Seconds of the slowest rank: of each step of each way, and of each renewal of the group."""
    port = free_port()
    place = folder / "steps"
    place.mkdir()
    with Children(place) as children:
        for rank in range(RANKS):
            command = python("-m", "benchmarks.elastic_steps", str(rounds), *_sizes(slots, model))
            children.start(command, gloo_environment(rank, RANKS, port))
        told = children.wait(TIMEOUT_S)
    ways = {
        way: [max(step) for step in zip(*(t["times"][way] for t in told), strict=True)]
        for way in told[0]["times"]
    }
    return ways, [max(times) for times in zip(*(t["init_s"] for t in told), strict=True)]


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--runs", type=int, help="losses, and restarts (7; quick: 2)")
    made.add_argument("--rounds", type=int, help="steps of each way (20; quick: 6)")
    made.add_argument("--slots", type=int, default=12, help="slots of the steps that are compared")
    made.add_argument("--model", default="--params 4m", help="options of the bundled job")
    made.add_argument("--seed", type=int, default=0, help="decides where ranks are killed")
    options = made.parse_args(argv)
    options.runs = options.runs or (2 if options.quick else 7)
    options.rounds = options.rounds or (6 if options.quick else 20)
    return options


if __name__ == "__main__":
    sys.exit(main())
