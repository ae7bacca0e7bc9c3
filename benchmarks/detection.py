"""Slow ranks: who is accused on recorded jobs, how soon, how often wrongly, and what it costs.

* Recorded jobs (`--data FOLDER`, with `bytedance_stragglers/trace-AR.parquet` and `-SE`) through
  the detectors that watch a live one: in AR exactly dp 0, stage 0 is slow, in SE nobody is.
* Delay: one rank of 64 made slower, on noise drawn from the recorded jobs' own residuals, under
  the threshold of a job of 10 000 ranks with steps of 10 s. Without data: on normal noise.
* False alarms a day in such a job: residuals drawn anew in blocks of 8 steps of one rank, as many
  rank-steps as `--rank-steps` says, with the 95 % interval for what is counted. Every crossing
  counts, also those that a live detector would refuse because they are no outliers.
* Overhead: processor time of what a rank records, for a collective and for a step.
* The coordinator's own cost for a step of 1 000 and of 10 000 ranks.

    python -m benchmarks.detection [--quick] [--json] [--save] [--data FOLDER]
"""

import argparse
import math
import random
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.figures import Figure, Report, finish, parser, say
from ftkit.collectives.handle import blocked_s
from ftkit.core.clock import MonotonicClock
from ftkit.core.ids import Generation, MemberId, NodeId, Seat, Step
from ftkit.core.verdict import Fault
from ftkit.core.world import Member, World
from ftkit.detection.cusum import BLOCK_STEPS, Threshold, calibrate, median, spread
from ftkit.detection.meter import Gauges
from ftkit.detection.observations import WorldChanged
from ftkit.detection.peers import residuals
from ftkit.detection.recorder import Recorder
from ftkit.detection.row import Phase
from ftkit.detection.signals import StepSeen
from ftkit.detection.status import StatusBoard
from ftkit.detection.step_detector import DAY_S, PaceConfig, StepDetector, work_of
from ftkit.launch.replay import replay
from ftkit.launch.traces import read_trace
from ftkit.session.core_clock import CoreClock

RANKS, STEP_S = 10_000, 10.0
#: Of the recorded jobs: who is slow.
TRUTH: Final[Mapping[str, frozenset[str]]] = {"AR": frozenset({"dp=0 pp=0"}), "SE": frozenset()}
EFFECTS: Final = (0.05, 0.10, 0.20)
SLOWER: Final = (1.1, 1.2, 1.5, 2.0)
#: Ranks of the job in which delays are measured, and the step from which one is slower.
SMALL, FROM = 64, 60
PATIENCE: Final = 250
#: The job that overhead is set against: a short step with many collectives.
STEP_OF_S, COLLECTIVES_OF = 0.1, 20

Noise = list[list[float]]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print. Returns the exit code."""
    options = _options(argv)
    figures, computed, problems, notes = list[Figure](), dict[str, str](), list[str](), list[str]()
    noises: dict[str, Noise] = {}
    if options.data is None:
        notes.append("no --data: no recorded jobs; noise is drawn from normal distributions")
        rng = random.Random(0)
        for name, sigma in (("normal 0.5 %", 0.005), ("normal 11 %", 0.11)):
            noises[name] = [[rng.gauss(0.0, sigma) for _ in range(44)] for _ in range(64)]
    else:
        for name, truth in TRUTH.items():
            say(f"recorded job {name}")
            steps = read_trace(
                options.data / "bytedance_stragglers" / f"trace-{name}.parquet", "bytedance"
            )
            figures += verdicts(name, steps, truth, problems)
            noises[name] = noise_of(steps, without=truth)
    for name, noise in noises.items():
        say(f"delays and false alarms on the noise of {name}")
        sigma = spread([e for series in noise for e in series])
        notes.append(f"{name}: noise {100 * sigma:.2f} %")
        figures += delays(name, noise, options.trials, quiet=sigma < 0.05)
        figures += false_alarms(name, noise, options.rank_steps)
    say("overhead")
    figures += overhead(options.repetitions)
    figures += coordinator(options.sizes)
    return finish(
        Report(
            name="detection",
            figures=figures,
            computed=computed,
            problems=problems,
            notes=notes,
            options={
                k: v.name if isinstance(v, Path) else str(v) for k, v in vars(options).items()
            },
            samples={},
        ),
        options,
    )


def verdicts(
    name: str, steps: Sequence[StepSeen], truth: frozenset[str], problems: list[str]
) -> list[Figure]:
    """Who is accused in a recorded job, at three sizes of effect."""
    figures: list[Figure] = []
    for effect in EFFECTS:
        replayed = replay(steps, PaceConfig(effect=effect))
        named = {str(said.verdict.evidence["place"]): said for said in replayed.accused}
        label = f"{name}, from {100 * effect:.0f} %"
        wrong, missed = sorted(set(named) - truth), sorted(truth - set(named))
        if wrong or missed:
            problems.append(f"{label}: accused {wrong} wrongly, missed {missed}")
        figures.append(
            Figure(name=f"{label}: wrongly accused", value=len(wrong), unit="ranks", at_most=0)
        )
        if truth:
            figures.append(
                Figure(name=f"{label}: culprits missed", value=len(missed), unit="", at_most=0)
            )
            after = max((said.steps for said in named.values()), default=None)
            figures.append(Figure(name=f"{label}: named after", value=after, unit="steps"))
    return figures


def noise_of(steps: Sequence[StepSeen], *, without: frozenset[str]) -> Noise:
    """Log residuals of each rank against its peers, in order of steps, culprits left out."""
    by_step: dict[tuple[int, str], dict[MemberId, float]] = defaultdict(dict)
    for seen in steps:
        if seen.place not in without:
            by_step[seen.step, seen.role][seen.member] = math.log(work_of(seen))
    series: dict[MemberId, list[float]] = defaultdict(list)
    for _, group in sorted(by_step.items()):
        for member, residual in residuals(group).items() if len(group) > 2 else ():
            series[member].append(residual)
    return list(series.values())


def blocks_of(noise: Noise) -> list[list[float]]:
    """Runs of neighbouring steps of one rank: what hangs together in time stays together."""
    return [
        series[i : i + BLOCK_STEPS]
        for series in noise
        for i in range(len(series) - BLOCK_STEPS + 1)
    ]


def delays(name: str, noise: Noise, trials: int, *, quiet: bool) -> list[Figure]:
    """Steps from when a rank becomes slower until it is named."""
    goals = {1.1: 5, 1.2: 5} if quiet else {1.2: 35}
    blocks = blocks_of(noise)
    figures = []
    for factor in SLOWER:
        found = sorted(
            _delay(blocks, factor, random.Random(f"{factor} {t}")) for t in range(trials)
        )
        figures.append(
            Figure(
                name=f"{name}: +{100 * (factor - 1):.0f} % named after, median",
                value=median(found),
                unit="steps",
                at_most=goals.get(factor),
                against=f"slowest of {trials}: {found[-1]}"
                + ("" if found[-1] < PATIENCE else " or more"),
            )
        )
    return figures


def _delay(blocks: list[list[float]], factor: float, rng: random.Random) -> int:
    # The budget of a small job that gives the threshold of the large one.
    config = PaceConfig(alarms_per_day=PaceConfig().alarms_per_day * SMALL / RANKS)
    detector = StepDetector(config)
    detector.ingest(WorldChanged(world=_world(SMALL), at=0.0))
    noise: list[list[float]] = [[] for _ in range(SMALL)]
    for step in range(FROM + PATIENCE):
        for seat, waiting in enumerate(noise):
            if not waiting:
                waiting.extend(rng.choice(blocks))
            slower = factor if seat == 5 and step >= FROM else 1.0
            detector.ingest(_seen(seat, step, slower * math.exp(waiting.pop())))
        if step >= FROM and any(v.fault is Fault.SLOW and v.seat == 5 for v in detector.tick(0.0)):
            return step - FROM + 1
    return PATIENCE


def false_alarms(name: str, noise: Noise, rank_steps: float) -> list[Figure]:
    """Crossings of the threshold a day, by drawing from the noise."""
    alarms_per_day = PaceConfig().alarms_per_day
    day = RANKS * DAY_S / STEP_S
    figures = []
    for effect in EFFECTS:
        # Two measures of work share the budget.
        threshold = calibrate(noise, effect=effect, steps_between=2 * day / alarms_per_day)
        count, played = _crossings(blocks_of(noise), threshold, rank_steps)
        days = played / day
        low, high = poisson_interval(count)
        figures.append(
            Figure(
                name=f"{name}, from {100 * effect:.0f} %: false alarms a day at most",
                value=high / days,
                unit="a day",
                at_most=1.0,
                against=f"{count} in {days:.1f} days of {RANKS} ranks and {STEP_S:g} s steps: "
                f"{count / days:.2g} a day, 95 % interval {low / days:.2g} to {high / days:.2g}",
            )
        )
    return figures


def _crossings(
    blocks: list[list[float]], threshold: Threshold, rank_steps: float
) -> tuple[int, float]:
    """How often sums of drawn residuals pass h, and in how many rank-steps."""
    rng = np.random.default_rng(0)
    pool = np.array(blocks, dtype=np.float32)
    most = threshold.h / threshold.steps
    pool = np.clip(pool - np.float32(threshold.k), -most, most).astype(np.float32)
    width = 50_000
    sums = np.zeros(width, dtype=np.float32)
    count = played = 0
    while played < rank_steps:
        drawn = pool[rng.integers(0, len(pool), width)]
        for step in range(BLOCK_STEPS):
            sums += drawn[:, step]
            np.maximum(sums, 0.0, out=sums)
            over = sums >= threshold.h * (1 - 1e-6)
            if over.any():
                count += int(over.sum())
                sums[over] = 0.0
        played += width * BLOCK_STEPS
    return count, float(played)


def poisson_interval(count: int) -> tuple[float, float]:
    """The 95 % interval of a Poisson mean of which `count` were seen (Wilson and Hilferty 1931)."""

    def cube(n: int, z: float) -> float:
        return float(n * (1 - 1 / (9 * n) + z / (3 * math.sqrt(n))) ** 3)

    return cube(count, -1.96) if count else 0.0, cube(count + 1, 1.96)


def overhead(repetitions: int) -> list[Figure]:
    """Processor time of recording, the least of several repetitions."""
    with (
        tempfile.TemporaryDirectory() as folder,
        StatusBoard.create(Path(folder) / "board", seats=1) as board,
    ):
        cores = CoreClock()
        gauges = Gauges(blocked_s=blocked_s, cpu_s=time.thread_time, starved_s=cores.starved_s)
        recorder = Recorder(board.attach(0, MemberId(1)), MonotonicClock(), gauges=gauges)
        count = [0]

        def collective() -> None:
            count[0] += 1
            recorder.enter(0, count[0], "all_reduce", 1024)
            recorder.leave(0, count[0], True)

        def step() -> None:
            count[0] += 1
            recorder.step(Step(count[0]))
            for phase in (Phase.DATA, Phase.FORWARD, Phase.DATA, Phase.FORWARD, Phase.REDUCE):
                recorder.phase(phase)
            for phase in (Phase.FORWARD, Phase.VOTE, Phase.CAPTURE, Phase.OPTIMIZER):
                recorder.phase(phase)
            recorder.finish(slots=2, loss=1.0)

        collective_us = _least_us(collective, repetitions)
        step_us = _least_us(step, repetitions)
        recorder.close()
        cores.close()
    share = (step_us + COLLECTIVES_OF * collective_us) / 1e6 / STEP_OF_S
    return [
        Figure(name="a collective's record", value=collective_us, unit="us", at_most=3.0),
        Figure(name="a step's record with its phases", value=step_us, unit="us"),
        Figure(
            name=f"of a step of {1e3 * STEP_OF_S:.0f} ms with {COLLECTIVES_OF} collectives",
            value=100 * share,
            unit="%",
            at_most=0.5,
        ),
    ]


def _least_us(call: Callable[[], None], repetitions: int, each: int = 2000) -> float:
    least = math.inf
    for _ in range(repetitions):
        began = time.thread_time_ns()
        for _ in range(each):
            call()
        least = min(least, (time.thread_time_ns() - began) / each / 1e3)
    return least


def coordinator(sizes: Iterable[int]) -> list[Figure]:
    """Processor time of judging one step."""
    figures = []
    for size in sizes:
        rng = random.Random(size)
        detector = StepDetector(PaceConfig())
        detector.ingest(WorldChanged(world=_world(size), at=0.0))
        took = []
        for step in range(12):
            seen = [_seen(seat, step, rng.lognormvariate(0.0, 0.01)) for seat in range(size)]
            began = time.process_time()
            for one in seen:
                detector.ingest(one)
            detector.tick(0.0)
            detector.ledger.take(rest=True)
            took.append(time.process_time() - began)
        # The first two are not judged.
        figures.append(
            Figure(
                name=f"a step of {size} ranks is judged in",
                value=1e3 * median(took[2:]),
                unit="ms",
                against=f"longest {1e3 * max(took):.0f} ms",
            )
        )
    return figures


def _seen(seat: int, step: int, work: float) -> StepSeen:
    return StepSeen(
        member=MemberId(seat),
        seat=Seat(seat),
        generation=Generation(1),
        step=Step(step),
        at=STEP_S * step,
        seconds={"forward": 0.9 * STEP_S * work},
        waited_s=0.1 * STEP_S,
        slots=1,
    )


def _world(size: int) -> World:
    return World.of(
        Generation(1),
        [
            Member(member=MemberId(i), seat=Seat(i), node=NodeId(i // 8), host="", port=0)
            for i in range(size)
        ],
    )


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--data", type=Path, help="folder with recorded jobs")
    made.add_argument("--trials", type=int, help="of each delay (40; quick: 5)")
    made.add_argument("--rank-steps", type=float, help="drawn for false alarms (1e9; quick: 4e8)")
    made.add_argument("--repetitions", type=int, help="of each overhead (30; quick: 8)")
    made.add_argument("--sizes", type=int, nargs="+", default=[1_000, 10_000], help="ranks")
    options: Any = made.parse_args(argv)
    quick = options.quick
    options.trials = options.trials or (5 if quick else 40)
    options.rank_steps = options.rank_steps or (4e8 if quick else 1e9)
    options.repetitions = options.repetitions or (8 if quick else 30)
    return argparse.Namespace(**vars(options))


if __name__ == "__main__":
    sys.exit(main())
