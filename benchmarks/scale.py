"""How far one coordinator carries: the real one, fed with the reports of up to 10,000 ranks.

No process is started and no network is used: a `LoneCoordinator` is handed the reports of all agents
in the form and at the pace in which agents send them (`agents`). Faults strike at random moments. Of
a killed rank the delay counts from the report that tells; of one that hangs, from when it stopped,
and all agents tell that nothing moves.
"""

import copy
import gc
import random
import sys
import tempfile
import tracemalloc
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.agents import PER_NODE, STEP_S, Stopped
from benchmarks.figures import Figure, Report, finish, parser, percentile, say
from benchmarks.lone_coordinator import LoneCoordinator
from ftkit.detection.tempo import STEPS_MIN

SIZES = (1_000, 2_000, 5_000, 10_000)
MADE_UP = (
    "the coordinator and its detectors are the real ones, the agents' reports are made up and arrive "
    "as text; the network and the decoding of frames are not in it"
)
#: Who is at fault has to be named within so much.
LIMIT_S = 60.0
#: Growth from the smallest to the largest size, over that of the size, that still counts as linear.
LINEAR = 1.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One size."""

    ranks: int
    step_cpu_s: float
    """Processor time for all that comes in a step, and for judging it."""
    look_cpu_s: float
    """Of judging alone: one look."""
    memory_bytes: int
    report_bytes: int
    verdict_s: list[float]
    """From the report of a death to the order that answers it."""
    hang_s: list[float]
    """From when a rank stops to when it is named."""


def measure(ranks: int, steps: int, faults: int, rng: random.Random) -> Sample:
    """One size: healthy steps for the cost, then faults for the delay of verdicts."""
    with tempfile.TemporaryDirectory() as name:
        gc.collect()
        gc.disable()  # as in `Coordinator.run`
        tracemalloc.start()
        lone = LoneCoordinator(ranks, Path(name))
        lone.form()
        lone.play(lone.clock.now() + 2 * STEP_S)
        memory, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        lone.settle()
        lone.look_cpu_s.clear()
        lone.cpu_s, lone.nbytes = 0.0, 0
        lone.settle(steps)
        step_cpu_s, report_bytes = lone.cpu_s / steps, int(lone.nbytes / steps)
        looks = sorted(lone.look_cpu_s)
        kills = [of_a_kill(lone, rng) for _ in range(faults)]
        lone.settle(2 * STEPS_MIN)  # the judge is a new one, and has to learn the job's tempo
        hangs = [of_a_hang(lone, rng) for _ in range(faults)]
        lone.close()
    return Sample(
        ranks=ranks,
        step_cpu_s=step_cpu_s,
        look_cpu_s=looks[len(looks) // 2],
        memory_bytes=memory,
        report_bytes=report_bytes,
        verdict_s=kills,
        hang_s=hangs,
    )


def of_a_kill(lone: LoneCoordinator, rng: random.Random) -> float:
    """A rank is killed; its agent tells at once, among all other reports. Then it is undone."""
    agents, coordinator = lone.agents, lone.coordinator
    plan, victim = coordinator._plan, rng.randrange(agents.nodes * PER_NODE)
    assert plan is not None, "it is running"
    at = lone.clock.now() + rng.random() * STEP_S
    node = victim // PER_NODE
    agents.dead[victim] = at
    lone.add(at, node)
    lone.play(at + LIMIT_S, over=lambda: coordinator._plan is not plan)
    if coordinator._plan is plan:
        raise RuntimeError(f"the death of rank {victim} was not noticed")
    delay = lone.clock.now() - at
    # As if it had not been: what follows a fault is the protocol's, and measured elsewhere.
    del agents.dead[victim]
    coordinator._plan = plan
    coordinator._judge = type(coordinator._judge)(coordinator._config)
    coordinator._judge.take_plan(plan, at=lone.clock.now())
    lone.settle()
    return delay


def of_a_hang(lone: LoneCoordinator, rng: random.Random) -> float:
    """A rank stops, and all others come to wait for it. Then it goes on."""
    agents, victim = lone.agents, rng.randrange(lone.agents.nodes * PER_NODE)
    at = lone.clock.now() + rng.random() * STEP_S
    lone.play(at)
    detector = lone.coordinator._judge._detector
    learnt = copy.deepcopy(detector._tempo), detector._slowest_step_s
    lone.heard.named.clear()
    agents.stopped = Stopped(victim, at)
    lone.play(at + LIMIT_S, over=lambda: victim in lone.heard.named)
    named = dict(lone.heard.named)
    if list(named) != [victim]:
        raise RuntimeError(f"rank {victim} stopped, and {sorted(named)} were named")
    agents.go_on(lone.clock.now())
    lone.settle()
    # It went on by itself, and that is now usual in this job: the next one is to find it as it was.
    detector._tempo, detector._slowest_step_s = learnt
    return named[victim] - at


def growth(samples: list[Sample], value: Any) -> float:
    """How much more than in proportion `value` grows from the smallest size to the largest."""
    first, last = samples[0], samples[-1]
    return float(value(last) / value(first) / (last.ranks / first.ranks))


def line_of(s: Sample) -> str:
    """One size, for people; pure."""
    killed, hung = (percentile(delays, 99) or 0.0 for delays in (s.verdict_s, s.hang_s))
    return (
        f"{s.ranks:,} ranks: {s.step_cpu_s:.3f} s a step, {s.memory_bytes / 1e6:.0f} MB, one look "
        f"{1e3 * s.look_cpu_s:.0f} ms, killed {killed:.3f} s, hung {hung:.3f} s (p99)"
    )


def plot(samples: list[Sample]) -> str:
    """Cost a step and memory over the number of ranks, as an SVG picture; pure."""
    width, height, left, bottom = 640, 300, 60, 40
    largest = samples[-1].ranks
    panels = [
        ("processor seconds a step", "#1565c0", [s.step_cpu_s for s in samples]),
        ("memory, 100 MB", "#c62828", [s.memory_bytes / 1e8 for s in samples]),
        (
            "verdict on a kill, p99, s",
            "#2e7d32",
            [percentile(s.verdict_s, 99) or 0.0 for s in samples],
        ),
        ("a hang named, p99, s", "#6a1b9a", [percentile(s.hang_s, 99) or 0.0 for s in samples]),
    ]
    top = max(max(values) for _, _, values in panels) * 1.1

    def x(ranks: float) -> float:
        return left + (width - left - 20) * ranks / largest

    def y(value: float) -> float:
        return height - bottom - (height - bottom - 30) * value / top

    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
    out = [
        head + 'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<path d="M{left} 20V{height - bottom}H{width - 20}" fill="none" stroke="#555"/>',
        *(
            f'<text x="{x(s.ranks):.0f}" y="{height - bottom + 16}" text-anchor="middle">'
            f"{s.ranks:,}</text>"
            for s in samples
        ),
    ]
    for part in range(1, 5):
        value = top * part / 4
        out.append(
            f'<text x="{left - 6}" y="{y(value) + 4:.0f}" text-anchor="end">{value:.2g}</text>'
        )
    for number, (label, colour, values) in enumerate(panels):
        points = " ".join(
            f"{x(s.ranks):.0f},{y(v):.0f}" for s, v in zip(samples, values, strict=True)
        )
        out.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        out.append(f'<text x="{left + 12}" y="{34 + 16 * number}" fill="{colour}">{label}</text>')
    out.append(
        f'<text x="{width / 2:.0f}" y="{height - 6}" text-anchor="middle">ranks</text></svg>'
    )
    return "\n".join(out) + "\n"


def main(argv: list[str]) -> int:
    """Measure every size and report."""
    arguments = parser(__doc__)
    arguments.add_argument("--sizes", type=int, nargs="+", help="numbers of ranks, ascending")
    arguments.add_argument("--steps", type=int, help="of a healthy job, each size")
    arguments.add_argument(
        "--faults", type=int, help="ranks that are killed and that hang, each size"
    )
    options = arguments.parse_args(argv)
    sizes = options.sizes or (SIZES[:2] if options.quick else SIZES)
    steps = options.steps or (2 if options.quick else 5)
    faults = options.faults or (5 if options.quick else 30)
    rng = random.Random(1)
    samples = []
    for ranks in sizes:
        samples.append(measure(ranks, steps, faults, rng))
        say(f"{ranks} ranks: {samples[-1].step_cpu_s:.3f} s of processor a step of {STEP_S:g} s")
    last = samples[-1]
    figures = [
        Figure(
            name=f"verdict at {last.ranks} ranks, 99th percentile",
            value=percentile(last.verdict_s, 99),
            unit="s",
            at_most=2.0,
            against="from the report's arrival, on one core",
        ),
        Figure(
            name=f"a hang at {last.ranks} ranks named, 99th percentile",
            value=percentile(last.hang_s, 99),
            unit="s",
            at_most=8 * STEP_S,
            against="from when it stopped; the goal is 8 steps",
        ),
        Figure(
            name=f"processor time a second at {last.ranks} ranks",
            value=last.step_cpu_s / STEP_S,
            unit="cores",
            at_most=1.0,
        ),
        Figure(
            name="growth of the cost a step", value=growth(samples, lambda s: s.step_cpu_s),
            unit="x", at_most=LINEAR, against="growth of the job",
        ),
        Figure(
            name="growth of memory", value=growth(samples, lambda s: s.memory_bytes),
            unit="x", at_most=LINEAR, against="growth of the job",
        ),
        Figure(name=f"memory at {last.ranks} ranks", value=last.memory_bytes / 1e6, unit="MB"),
        Figure(name=f"one look at {last.ranks} ranks", value=last.look_cpu_s, unit="s"),
        Figure(
            name=f"reports at {last.ranks} ranks", value=last.report_bytes / STEP_S / 1e6, unit="MB/s"
        ),
    ]  # fmt: skip
    report = Report(
        name="scale",
        figures=figures,
        computed={"ranks": ", ".join(str(s.ranks) for s in samples)},
        notes=[MADE_UP, *map(line_of, samples), "plot: scale.svg"],
        options=vars(options),
        samples=[asdict(s) for s in samples],
    )
    if options.save is not None and not options.quick:
        options.save.mkdir(parents=True, exist_ok=True)
        (options.save / "scale.svg").write_text(plot(samples))
    return finish(report, options)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
