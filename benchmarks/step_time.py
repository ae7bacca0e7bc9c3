"""The step of DDP through ftkit against the step of plain DDP on gloo: what protection costs.

Through ftkit everything is on, by default: canonical reduction, the vote, a snapshot of every
step, status rows, agent and coordinator. Plain DDP has nothing but gloo. Same model, same
samples in the same order, one slot a rank (so that both do the same forward and backward
passes), one torch thread a rank, AdamW.

Method: child jobs that alternate, ftkit and plain, in rounds; the order turns round by round
(AB, BA, ...), so that a drift of the machine falls on both alike, and never do both run at
once. A job's first steps are left out. A step's time is the interval between the ends of two
steps of a rank. Each round gives one ratio, of the medians over all steps and ranks; the figure
is the median of the rounds' ratios, with the least and the greatest beside it.

There is no switch that turns snapshots off, so their share is told instead: the time for which
the training thread stood still for them, per step.

After the same steps on the same samples both losses must agree to 1e-3; gloo sums in another
order, so parameters may differ in the last bits. All of ftkit's rounds must end in the same
bits.

    python -m benchmarks.step_time [--models 4m 25m] [--worlds 2 4] [--rounds 5] [--save]
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.children import Children, free_port, gloo_environment, python
from benchmarks.figures import Figure, Report, as_samples, finish, parser, say
from benchmarks.jobs import Event, Job, params_of, scratch

#: How far the losses may be apart, relative: gloo's order of summing is another one.
LOSS_TOLERANCE = 1e-3

#: Samples of a rank's slot; small, so that what ftkit adds is not hidden behind arithmetic.
SLOT_SIZE = {"4m": 2, "25m": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One job: medians in seconds."""

    step_s: float
    blocked_s: float | None
    """Median time a step's snapshot kept the training thread; None for plain DDP."""
    loss: float
    params: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """Both jobs, one after the other."""

    model: str
    nproc: int
    ftkit: Side
    plain: Side

    @property
    def ratio(self) -> float:
        """The median step of ftkit over plain DDP's."""
        return self.ftkit.step_s / self.plain.step_s


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print. Returns the exit code."""
    options = _options(argv)
    rounds = list[Round]()
    with scratch("step-time") as folder:
        for number in range(options.rounds):
            for model in options.models:
                for nproc in options.worlds:
                    here = folder / f"{model}-{nproc}-{number}"
                    here.mkdir()
                    done = run_round(
                        model, nproc, here, options.steps, options.warm, ftkit_first=number % 2 == 0
                    )
                    say(f"round {number}, {model}, {nproc} ranks: ratio {done.ratio:.3f}")
                    rounds.append(done)
    return finish(report(rounds, vars(options)), options)


def run_round(
    model: str, nproc: int, folder: Path, steps: int, warm: int, *, ftkit_first: bool
) -> Round:
    """One job of each kind. Blocks.

    Args:
      model: a preset's name.
      nproc: ranks, and slots.
      folder: for both runs; exists.
      steps: steps of each job.
      warm: how many of them are left out of the times.
      ftkit_first: the order.
    """
    if ftkit_first:
        ours = run_ftkit(model, nproc, folder, steps, warm)
        theirs = run_plain(model, nproc, folder, steps, warm)
    else:
        theirs = run_plain(model, nproc, folder, steps, warm)
        ours = run_ftkit(model, nproc, folder, steps, warm)
    return Round(model=model, nproc=nproc, ftkit=ours, plain=theirs)


def run_ftkit(model: str, nproc: int, folder: Path, steps: int, warm: int) -> Side:
    job = Job(
        nproc=nproc,
        steps=steps,
        slots=nproc,
        slot_size=SLOT_SIZE[model],
        model=("--params", model),
    )
    events = job.run(folder / "ftkit")
    (params,) = params_of(events)
    losses = [float(e["loss"]) for e in events if e["kind"] == "final"]
    ends = [
        [float(e["mono"]) for e in _of(events, "commit", member)] for member in _members(events)
    ]
    blocked = [
        e["begin_s"] + e["gate_s"] for e in events if e["kind"] == "snapshot" and e["step"] > warm
    ]
    return Side(
        step_s=median_interval(ends, warm),
        blocked_s=statistics.median(blocked) if blocked else None,
        loss=losses[0],
        params=params,
    )


def run_plain(model: str, nproc: int, folder: Path, steps: int, warm: int) -> Side:
    port = free_port()
    command = python(
        *("-m", "benchmarks.plain_ddp", "--params", model, "--steps", str(steps)),
        *("--slot-size", str(SLOT_SIZE[model])),
    )
    (folder / "plain").mkdir()
    with Children(folder / "plain") as children:
        for rank in range(nproc):
            children.start(command, gloo_environment(rank, nproc, port))
        told = children.wait(timeout_s=120 + 10 * steps)
    (params,) = {str(t["params"]) for t in told}
    return Side(
        step_s=median_interval([t["times"] for t in told], warm),
        blocked_s=None,
        loss=float(told[0]["loss"]),
        params=params,
    )


def median_interval(ends: Sequence[Sequence[float]], warm: int) -> float:
    """The median interval between a rank's steps, over all ranks; pure.

    Args:
      ends: for each rank, when its steps ended, in seconds.
      warm: steps at the beginning whose intervals are left out.
    """
    return statistics.median(
        later - sooner
        for times in ends
        for sooner, later in zip(times[warm:], times[warm + 1 :], strict=False)
    )


def report(rounds: Sequence[Round], options: dict[str, object]) -> Report:
    """One ratio for each model and world, from all its rounds; pure."""
    figures, computed, problems = list[Figure](), dict[str, str](), list[str]()
    cases = sorted({(r.model, r.nproc) for r in rounds}, key=lambda c: (len(c[0]), c))
    for model, nproc in cases:
        mine = [r for r in rounds if (r.model, r.nproc) == (model, nproc)]
        name = f"{model}, {nproc} ranks"
        ratios = sorted(r.ratio for r in mine)
        plain_s = statistics.median(r.plain.step_s for r in mine)
        ours_s = statistics.median(r.ftkit.step_s for r in mine)
        blocked = [r.ftkit.blocked_s for r in mine if r.ftkit.blocked_s is not None]
        figures += [
            Figure(
                name=f"{name}: step, ftkit / plain DDP",
                value=statistics.median(ratios),
                unit="x",
                at_most=1.0,
                against=f"plain DDP on gloo: {plain_s * 1e3:.1f} ms; rounds "
                f"{ratios[0]:.3f}..{ratios[-1]:.3f}; torchft adds 5-9 ms",
            ),
            Figure(name=f"{name}: step through ftkit", value=ours_s, unit="s"),
            Figure(
                name=f"{name}: of which blocked by the snapshot",
                value=statistics.median(blocked) if blocked else None,
                unit="s",
            ),
        ]
        digests = {r.ftkit.params for r in mine}
        computed[f"parameters, {name}"] = " ".join(sorted(digests))
        computed[f"parameters of plain DDP, {name}"] = " ".join(
            sorted({r.plain.params for r in mine})
        )
        computed[f"loss, {name}"] = f"ftkit {mine[0].ftkit.loss!r}, plain {mine[0].plain.loss!r}"
        if len(digests) != 1:
            problems.append(f"{name}: ftkit ended in {len(digests)} different sets of parameters")
        problems += [
            f"{name}: the loss through ftkit is {r.ftkit.loss}, of plain DDP {r.plain.loss}: they "
            f"differ by more than {LOSS_TOLERANCE:g}"
            for r in mine
            if abs(r.ftkit.loss - r.plain.loss) > LOSS_TOLERANCE * abs(r.plain.loss)
        ]
    return Report(
        name="step_time",
        figures=figures,
        computed=computed,
        problems=problems,
        options=options,
        samples=as_samples(rounds),
    )


def _of(events: Sequence[Event], kind: str, member: int) -> list[Event]:
    return [e for e in events if e["kind"] == kind and e["member"] == member]


def _members(events: Sequence[Event]) -> set[int]:
    return {int(e["member"]) for e in events if e["kind"] == "commit"}


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--models", nargs="+", choices=sorted(SLOT_SIZE), default=["4m", "25m"])
    made.add_argument("--worlds", type=int, nargs="+", default=[2, 4], help="ranks")
    made.add_argument("--rounds", type=int, help="pairs of jobs for each case (5; quick: 2)")
    made.add_argument("--steps", type=int, help="steps of a job (60; quick: 30)")
    made.add_argument("--warm", type=int, default=10, help="of which these are left out")
    options = made.parse_args(argv)
    if options.rounds is None:
        options.rounds = 2 if options.quick else 5
    if options.steps is None:
        options.steps = 30 if options.quick else 60
    if options.steps < options.warm + 2:
        made.error(f"--steps must be at least --warm + 2, got {options.steps} and {options.warm}")
    return options


if __name__ == "__main__":
    sys.exit(main())
