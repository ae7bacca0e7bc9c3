"""Guards: whether a job may be struck now, and if not, why not. Pure.

Every guard answers with a sentence when it forbids, and the first that does is told.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from ftkit.launch.drill_faults import LOSE_NODE, OF_NODES
from ftkit.launch.programme.costs import Budget
from ftkit.launch.programme.job_state import JobState
from ftkit.launch.programme.targets import Target
from ftkit.recovery.facts import Stage
from ftkit.recovery.plan import Mode


@dataclass(frozen=True, slots=True, kw_only=True)
class Guards:
    """What was asked for."""

    budget: Budget
    steps_between: int = 100
    """Steps that are committed undisturbed before a strike, after whatever happened last."""
    only_with_spares: bool = False
    parity: str = ""
    """The job's: k+m, or none."""


def refusal(
    guards: Guards, job: JobState, target: Target | None, *, spent_s: float, expected_s: float
) -> str:
    """Why the job may not be struck now; empty when it may.

    Args:
      guards: what was asked for.
      job: how it stands.
      target: what is to be struck; None when there is nothing.
      spent_s: training time that drills have cost it within the budget's window.
      expected_s: what this one is expected to cost.
    """
    every = (
        _unhealthy(job),
        _unsettled(guards, job),
        _unwise(guards, job, target),
        _too_dear(guards.budget, spent_s, expected_s),
    )
    return next((reason for some in every for reason in some), "")


def _unhealthy(job: JobState) -> Iterator[str]:
    """Not everybody trains, or not everybody agrees on who does."""
    for node, reason in sorted(job.silent.items()):
        yield f"node {node} does not answer: {reason}"
    plan = job.plan
    if plan is None or plan.world is None:
        yield "no world has been formed"
        return
    if plan.stop is not None:
        yield f"the job is over: {plan.stop.reason}"
    if plan.mode is not Mode.RUNNING:
        yield f"the job is {plan.mode}"
    if behind := sorted(n for n, s in job.nodes.items() if s.order != plan.order):
        yield f"nodes {behind} do not have the newest plan yet"
    if unled := sorted(n for n, s in job.nodes.items() if not s.led):
        yield f"nodes {unled} hear of no coordinator"
    if draining := sorted(n for n, s in job.nodes.items() if s.draining):
        yield f"nodes {draining} are about to be taken away"
    if len(plan.world.members) < job.seats:
        yield f"{len(plan.world.members)} of {job.seats} ranks train"
    active = [
        m for m in job.world if m.stage is Stage.ACTIVE and m.generation == plan.world.generation
    ]
    if len(active) < len(plan.world.members):
        yield f"{len(plan.world.members) - len(active)} ranks of the world are not active in it"
    if plan.joining is not None or plan.evicted:
        yield "somebody is on the way in, or out"
    if not all(m.stepping for m in job.world):
        yield "the script does not play its steps through ftkit: nothing shows what a drill costs"


def _unsettled(guards: Guards, job: JobState) -> Iterator[str]:
    """Something happened a short while ago, or happens now."""
    yield from job.accusations
    steps = job.committed - job.undisturbed_since
    if steps < guards.steps_between:
        yield (
            f"{max(0, steps)} steps were committed since the world became what it is, "
            f"{guards.steps_between} are wanted"
        )


def _unwise(guards: Guards, job: JobState, target: Target | None) -> Iterator[str]:
    """The job would not survive it, or only as nobody wants it to."""
    if target is None:
        yield "nobody trains"
        return
    struck = set(target.members)
    if all(m.member in struck for m in job.world):
        yield f"{target.words} leaves nobody: it takes a job of more ranks, or of more nodes"
    if any(m.sharded for m in job.world) and target.fault == LOSE_NODE and not guards.parity:
        yield f"{target.words} loses shards of the state, and the job keeps no parity"
    if guards.only_with_spares and (reason := _short_of_spares(job, target)):
        yield reason


def _short_of_spares(job: JobState, target: Target) -> str:
    """Why not every rank that is struck has a spare one at once; empty when it has."""
    if target.fault in OF_NODES and job.spare_nodes:
        return ""
    standing = [m for m in job.spares if target.fault not in OF_NODES or m.node != target.node]
    if len(standing) >= len(target.members):
        return ""
    return f"{len(standing)} spare ranks stand by, {len(target.members)} are wanted"


def _too_dear(budget: Budget, spent_s: float, expected_s: float) -> Iterator[str]:
    if spent_s + expected_s > budget.lost_s:
        yield (
            f"the budget: drills have cost {spent_s:.1f} s of training within {budget.window_s:.0f} s, "
            f"this one may cost {expected_s:.1f} s, and {budget.lost_s:.1f} s are allowed"
        )
