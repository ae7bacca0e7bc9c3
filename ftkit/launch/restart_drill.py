"""A job that ends with a checkpoint, and is started again from it with one rank fewer, or more."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ftkit.launch.checker import Answer, Outcome
from ftkit.recovery.plan import Stop

if TYPE_CHECKING:
    from ftkit.launch.drill_job import Job
    from ftkit.launch.drill_plan import Drill

RESTART_SMALLER: Final = "restart-smaller"
GROW: Final = "grow"

CATALOGUE: Final[Mapping[str, str]] = {
    RESTART_SMALLER: "the job ends half-way with a checkpoint, and starts again with a rank fewer",
    GROW: "the job ends half-way with a checkpoint, and starts again with a rank more than it ever had",
}

Events = Iterable[Mapping[str, Any]]


def resized(job: "Job", ranks: int) -> "Job":
    """The job with so many ranks more on each node, or nodes more where each has one."""
    if job.nodes == 1:
        return replace(job, nproc=job.nproc + ranks)
    return replace(job, nodes=job.nodes + ranks)


def run_restart(
    drill: "Drill", job: "Job", reference: Events | None, run_dir: Path
) -> tuple[Outcome, list[dict[str, Any]]]:
    """Run both halves and judge them. Blocks. Returns the outcome and the second half's events."""
    settings = {"checkpoint_dir": str(run_dir / "checkpoints")}
    half = replace(job, steps=drill.step)
    first, before = half.run(run_dir / "before", settings=settings)
    then = resized(job, 1 if drill.fault == GROW else -1)
    second, after = then.run(run_dir, settings=settings)
    outcome = judge(
        drill.fault, [first, second], before, after, reference or (), half=drill.step, steps=job.steps,
        slots=job.slots, slot_size=job.slot_size, seed=drill.seed,
    )  # fmt: skip
    return outcome, after


def judge(
    fault: str,
    stops: Iterable[Stop],
    before: Events,
    after: Events,
    reference: Events,
    *,
    half: int,
    steps: int,
    slots: int,
    slot_size: int,
    seed: int,
) -> Outcome:
    """What came of both halves; pure.

    * B1 both ended well, and the second one began with step `half` + 1;
    * B2 every step was committed, with each of its slots once;
    * B3 the parameters are those of the undisturbed run.
    """
    problems = [f"a half ended with {s.code}: {s.reason}" for s in stops if s.code]
    began = min((e["step"] for e in after if e["kind"] == "commit"), default=None)
    if began != half + 1:
        problems.append(f"the second half began with step {began}, not {half + 1}")
    lost = doubled = 0
    for step in range(1, steps + 1):
        events = before if step <= half else after
        votes = {e["seat"]: e["slots"] for e in events if e["kind"] == "vote" and e["step"] == step}
        held = [slot for mine in votes.values() for slot in mine]
        lost += len(set(range(slots)) - set(held)) * slot_size
        doubled += (len(held) - len(set(held))) * slot_size
    if lost or doubled:
        problems.append(f"{lost} samples were lost, {doubled} doubled")
    ours, theirs = ({e["params"] for e in es if e["kind"] == "final"} for es in (after, reference))
    missing = [] if len(theirs) == 1 else ["no undisturbed run to compare with"]
    equal = ours == theirs if theirs else None
    if equal is False:
        problems.append("the final parameters are not the undisturbed run's")
    answer = Answer.FAIL if problems else Answer.UNKNOWN if missing else Answer.PASS
    return Outcome(
        outcome=answer, fault=fault, phase="any", seed=seed, detect_s=None,
        repair_s=None, steps_lost=0, samples_lost=lost, samples_doubled=doubled,
        survivor_exits=0, params_equal=equal, verdict=None,
        evidence={"problems": problems, "missing": missing, "began_with": began},
    )  # fmt: skip
