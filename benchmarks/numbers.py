"""Wrong numbers on purpose: is it said whose, and where? And what does looking cost?

Drills of bits that flip (weight, optimizer, gradient), of NaN (once, and from the data) and of
losses that leap, each with its own seed, on one job of three ranks; right is a drill that its
checker passes: the class, the rank, the tensor or bucket, nobody else accused, and the final bits
where the fault may leave no trace. Shares have 95 % Wilson intervals.

The cost is measured in one process, on a model of a few million parameters: one digest of all
replicated state, and the norms of all gradients, beside a step of that model.

    python -m benchmarks.numbers [--quick] [--json] [--save]
"""

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.drills import Judged, run_all
from benchmarks.figures import Figure, Report, finish, parser
from benchmarks.jobs import python_path, scratch
from ftkit.checkpoint.state import ProtectedState
from ftkit.collectives.gradients import norm_of
from ftkit.collectives.state_hash import hash_of
from ftkit.core.samples import wilson
from ftkit.launch.checker import Answer
from ftkit.launch.drill_job import Job
from ftkit.launch.drill_plan import choose
from ftkit.launch.number_drills import BIT_FLIP, LOSS_SPIKE, NAN
from ftkit.launch.workload.gpt import GPT, PRESETS, next_byte_loss
from ftkit.session.cadence import BUDGET

FAULTS = (BIT_FLIP, NAN, LOSS_SPIKE)

#: Of drills, that are right in everything.
RIGHT = 0.99


def main(argv: Sequence[str] | None = None) -> int:
    """Drill, measure and print. Returns the exit code."""
    options = _options(argv)
    os.environ["PYTHONPATH"] = python_path()
    job = Job(nproc=options.nproc, steps=options.steps)
    drills = [
        choose(fault, None, seed=options.seed + k, nproc=job.nproc, steps=job.steps)
        for fault in FAULTS
        for k in range(options.count)
    ]
    with scratch("numbers") as folder:
        judged, params = run_all(drills, job, folder, kept=options.runs_dir)
    return finish(report(judged, params, cost(options.params), vars(options)), options)


def cost(params: str) -> dict[str, float]:
    """Seconds of a step, of one digest of the state and of the norms; the best of some each."""
    torch.set_num_threads(1)
    model = GPT(PRESETS[params], seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    state = ProtectedState(model=model, optimizer=optimizer)
    context = PRESETS[params].context
    x = torch.randint(0, 256, (4, context + 1))

    def step() -> None:
        optimizer.zero_grad()
        next_byte_loss(model(x[:, :-1]), x[:, 1:]).backward()
        optimizer.step()

    def best(work: Callable[[], object], rounds: int) -> float:
        taken = []
        for _ in range(rounds):
            start = time.perf_counter()
            work()
            taken.append(time.perf_counter() - start)
        return min(taken)

    step()
    return {
        "step_s": best(step, 5),
        "digest_s": best(lambda: [hash_of(t) for t in state.tensors()], 10),
        "norms_s": best(
            lambda: [norm_of(p.grad).item() for p in model.parameters() if p.grad is not None], 10
        ),
        "state_bytes": float(sum(t.nbytes for t in state.tensors())),
    }


def report(
    judged: Sequence[Judged], params: str, costs: dict[str, float], options: dict[str, object]
) -> Report:
    """The figures; pure."""
    figures = list[Figure]()
    for fault in (*FAULTS, "all"):
        some = [j for j in judged if fault in ("all", j.drill.fault)]
        right = sum(j.outcome.outcome is Answer.PASS for j in some)
        low, high = wilson(right, len(some))
        figures.append(
            Figure(
                name=f"{fault}: right in class, rank and place",
                value=right / len(some) if some else None,
                unit="",
                at_least=RIGHT if fault == "all" else None,
                against=f"{right} of {len(some)}, 95 % in [{low:.3f}, {high:.3f}]",
            )
        )
    wrong = sum(
        "is said to be" in str(problem)
        for j in judged
        for problem in _list(j.outcome.evidence.get("problems"))
    )
    seen = [j.outcome.detect_s for j in judged if j.outcome.detect_s is not None]
    late = [j.outcome.evidence.get("within_steps") for j in judged]
    digest, norms = costs["digest_s"] / costs["step_s"], costs["norms_s"] / costs["step_s"]
    every = 2 ** math.ceil(math.log2(max(1.0, digest / BUDGET)))
    return Report(
        name="numbers",
        figures=[
            *figures,
            Figure(name="accused and innocent", value=wrong, unit="", at_most=0),
            Figure(name="fault to verdict, slowest", value=max(seen, default=None), unit="s"),
            Figure(
                name="steps to verdict, most",
                value=max((n for n in late if isinstance(n, int)), default=None),
                unit="",
            ),
            Figure(name="digest of all state, a step", value=digest, unit="", against="step = 1"),
            Figure(
                name=f"the same every {every} steps, as chosen",
                value=digest / every,
                unit="",
                at_most=BUDGET,
                against="step = 1",
            ),
            Figure(name="norms of all gradients", value=norms, unit="", against="step = 1"),
        ],
        computed={"parameters of the undisturbed run": params},
        notes=[
            f"{j.outcome.outcome.value}: ftkit drill run {j.drill.fault} --seed {j.drill.seed} "
            f"--nproc {options['nproc']} --steps {options['steps']}: "
            f"{j.outcome.evidence.get('problems') or j.outcome.evidence.get('missing')}"
            for j in judged
            if j.outcome.outcome is not Answer.PASS
        ],
        options=options,
        samples={
            "cost": costs,
            "drills": [
                {
                    "fault": j.drill.fault,
                    "where": j.drill.where,
                    "seed": j.drill.seed,
                    "outcome": j.outcome.outcome.value,
                    "detect_s": j.outcome.detect_s,
                    "verdict": j.outcome.verdict,
                }
                for j in judged
            ],
        },
    )


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--count", type=int, help="drills of each fault (20; quick: 2)")
    made.add_argument("--seed", type=int, default=0, help="seed of the first drill of each")
    made.add_argument("--nproc", type=int, default=3, help="ranks of the job")
    made.add_argument("--steps", type=int, default=60, help="steps of the job")
    made.add_argument(
        "--params", choices=sorted(PRESETS), default=min(PRESETS), help="for the cost"
    )
    made.add_argument(
        "--runs-dir", type=Path, default=Path("runs/numbers"), help="keeps what did not pass"
    )
    options = made.parse_args(argv)
    if options.count is None:
        options.count = 2 if options.quick else 20
    return options


if __name__ == "__main__":
    sys.exit(main())
