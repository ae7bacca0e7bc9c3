"""From SIGKILL to the survivors' next committed step, under a framework's loop and under a plain one.

The same training three times, in turns: in a plain loop, under Hugging Face's Trainer and under
Lightning (`framework_job`). In each job rank after rank kills itself with SIGKILL at a random phase
of a random step, alike in all three; the time ends when the *last* survivor has committed a step
in the new generation (as in `repair`). The figure is the ratio of medians to the plain loop's. A
loop whose jobs did not all end with the parameters of its undisturbed one has no figures. Beside
it: the median step, and the lines that an example differs by from its plain one.

    python -m benchmarks.frameworks [--quick] [--json] [--save]
"""

import argparse
import difflib
import importlib.util
import random
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.faults import Repair, follow, median_step, plan_faults, steps_for
from benchmarks.figures import Figure, Report, as_samples, finish, parser, say
from benchmarks.jobs import ROOT, Job, params_of, scratch
from ftkit.core.fault_plan import Kind

#: Goal: kill to the next committed step, against the plain loop.
RATIO = 1.5

#: An example, the plain one beside it, and the lines that may differ.
EXAMPLES = {
    "huggingface": ("hf_plain", "hf_trainer", 2),
    "lightning": ("lightning_plain", "lightning_strategy", 2),
    "accelerate": ("accelerate_plain", "accelerate_steps", 8),
    "plain": ("ddp_plain", "ddp_minimal", 8),
    "fsdp2": ("fsdp_plain", "fsdp_elastic", 12),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameworkJob(Job):
    """The training under one of the loops."""

    loop: str
    width: int

    @property
    def command(self) -> tuple[str, ...]:
        sizes = (self.steps, self.slots, self.width, self.slot_size)
        module = ("-m", "benchmarks.framework_job", self.loop)
        return (sys.executable, "-u", *module, *(str(size) for size in sizes))


@dataclass(slots=True)
class Found:
    """What was measured of one loop."""

    steps_s: list[float] = field(default_factory=list)
    repairs: list[Repair] = field(default_factory=list)
    params: dict[int, set[str]] = field(default_factory=dict)
    """Of all jobs, by their steps."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print. Returns the exit code."""
    options = _options(argv)
    missing = [m for m in ("transformers", "lightning") if importlib.util.find_spec(m) is None]
    if missing:
        print(f"needs {', '.join(missing)}: pip install --group test", file=sys.stderr)
        return 1
    found = {loop: Found() for loop in ("plain", "huggingface", "lightning")}
    with scratch("frameworks") as folder:
        for number in range(options.rounds):
            for loop, mine in found.items():
                _measure(options, loop, mine, folder / f"{loop}-{number}", number)
            counts = {loop: len(mine.repairs) for loop, mine in found.items()}
            say(f"round {number}: kills {counts}")
    return finish(report(found, vars(options)), options)


def _measure(
    options: argparse.Namespace, loop: str, mine: Found, folder: Path, number: int
) -> None:
    kills = min(options.kills, options.nproc)
    job = FrameworkJob(
        nproc=options.nproc,
        steps=steps_for(kills, options.gap),
        slots=options.slots,
        slot_size=options.slot_size,
        loop=loop,
        width=options.width,
    )
    if number == 0:
        mine.params.setdefault(job.steps, set()).update(params_of(job.run(folder / "undisturbed")))
    rng = random.Random(f"{options.seed} {number}")  # the same kills in every loop
    faults = plan_faults(rng, [Kind.KILL], nproc=options.nproc, count=kills, gap=options.gap)
    events = job.run(folder / "killed", faults=faults)
    mine.params.setdefault(job.steps, set()).update(params_of(events))
    step_s = median_step(events, size=options.nproc)
    mine.steps_s.append(step_s)
    mine.repairs += follow(events, nproc=options.nproc)


def report(found: Mapping[str, Found], options: Mapping[str, object]) -> Report:
    """The figures; pure but for the examples, which are read."""
    medians = {loop: _median(mine.repairs) for loop, mine in found.items()}
    figures, problems = list[Figure](), list[str]()
    for loop, mine in found.items():
        figures += [
            Figure(name=f"{loop}: median step", value=statistics.median(mine.steps_s), unit="s"),
            Figure(name=f"{loop}: kill to next committed step p50", value=medians[loop], unit="s"),
        ]
        if loop != "plain":
            mean, base = medians[loop], medians["plain"]
            figures.append(
                Figure(
                    name=f"{loop}: kill to next committed step / plain loop",
                    value=mean / base if mean and base else None,
                    unit="x",
                    at_most=RATIO,
                    against="the plain loop in the same run",
                )
            )
        problems += [
            f"{loop}: jobs of {steps} steps ended with {len(params)} sets of parameters"
            for steps, params in mine.params.items()
            if len(params) != 1
        ]
    for name, (before, after, lines) in EXAMPLES.items():
        figures.append(
            Figure(
                name=f"{name}: lines changed",
                value=changed_lines(before, after),
                unit="lines",
                at_most=lines,
            )
        )
    return Report(
        name="frameworks",
        figures=figures,
        computed={
            f"parameters under {loop}": ", ".join(sorted(set().union(*mine.params.values())))
            for loop, mine in found.items()
        },
        problems=problems,
        notes=[
            f"{loop}: {left} kills struck before the world had healed and are not counted"
            for loop, mine in found.items()
            if (left := sum(not r.whole for r in mine.repairs))
        ],
        options=options,
        samples={loop: as_samples(mine.repairs) for loop, mine in found.items()},
    )


def changed_lines(before: str, after: str) -> int:
    """Lines to type or delete between two examples: n that turn into m count as the larger."""
    plain, ours = (
        (ROOT / "examples" / f"{name}.py").read_text().splitlines() for name in (before, after)
    )
    hunks = difflib.SequenceMatcher(None, plain, ours, autojunk=False).get_opcodes()
    return sum(max(b - a, d - c) for kind, a, b, c, d in hunks if kind != "equal")


def _median(repairs: Sequence[Repair]) -> float | None:
    values = [r.repair_s for r in repairs if r.whole and r.repair_s is not None]
    return statistics.median(values) if values else None


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--rounds", type=int, help="jobs of each loop (7; quick: 1)")
    made.add_argument("--kills", type=int, default=3, help="kills in a job, at most one a rank")
    made.add_argument("--nproc", type=int, default=3, help="ranks")
    made.add_argument("--gap", type=int, default=160, help="steps between two kills of a job")
    made.add_argument("--slots", type=int, default=6, help="slots of the global batch")
    made.add_argument("--slot-size", type=int, default=32, help="samples of a slot")
    made.add_argument("--width", type=int, default=384, help="of the model's four layers")
    made.add_argument("--seed", type=int, default=0, help="decides seats, phases and moments")
    options = made.parse_args(argv)
    if options.rounds is None:
        options.rounds = 1 if options.quick else 7
    return options


if __name__ == "__main__":
    sys.exit(main())
