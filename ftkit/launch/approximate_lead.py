"""ApproximateLead: the coordinator's look at what may replace lost shards, where a job allows it."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ftkit.core.errors import ProtocolError
from ftkit.core.ids import NodeId, Seat
from ftkit.core.inventory import Copy, Inventory
from ftkit.launch.disk import Tell
from ftkit.recovery.approximation import OldShard, Remains, judge, remains
from ftkit.recovery.costs import Costs
from ftkit.recovery.facts import Allowed, JobFacts
from ftkit.recovery.plan import Mode, Plan

logger = logging.getLogger(__name__)


def with_remains(
    facts: JobFacts,
    plan: Plan,
    copies: tuple[Copy, ...],
    reports: Mapping[NodeId, Mapping[str, Any]],
    costs: Costs,
) -> JobFacts:
    """The facts, with what a job that has lost shards may go on from instead; pure.

    Args:
      facts: of a job that is FORMING, of which memory has no step whole; `snapshots` has the newest
        checkpoint, if there is one.
      plan: its plan.
      copies: what the nodes that live hold.
      reports: of these nodes.
      costs: of this job.
    """
    if facts.awaited or not any(f.sharded for f in facts.members.values()):
        return facts
    left = remains(Inventory(copies=copies))
    allowed = max((f.allowed for f in facts.members.values()), default=Allowed.NOTHING)
    judged = judge(
        left,
        allowed=allowed,
        seats=_seats(plan, left),
        old=_old(reports),
        checkpoint=max(facts.snapshots, default=None),
        costs=costs,
    )
    return replace(facts, approximation=judged.taken, lacking=judged.reason)


def tell_approximation(before: Plan, after: Plan, facts: JobFacts, tell: Tell) -> None:
    """Say aloud that the result is not that of an undisturbed run any more, if it is so from now on."""
    taken = after.approximation
    if taken is None or after.mode is not Mode.RUNNING or before.resumed == after.resumed:
        return
    logger.warning(
        "the job goes on approximately from step %d, its result is not that of an undisturbed run: %s",
        taken.step,
        facts.lacking,
    )
    tell(
        "approximate",
        way=taken.way.value,
        seats=list(taken.lost),
        stages=[taken.seats.index(s) for s in taken.lost],
        step=taken.step,
        age=taken.age,
        generation=after.resumed,
        reason=facts.lacking,
    )


def _seats(plan: Plan, left: Remains | None) -> tuple[Seat, ...]:
    """The seats of the world that captured what is left; none where nobody knows them."""
    if left is None:
        return ()
    for world in (plan.world, plan.joining):
        if world is not None and world.generation == left.generation:
            return tuple(m.seat for m in world.members)
    # A further loss before the world that went on from it had captured anything.
    last = plan.approximation
    if last is not None and (last.generation, last.step) == (left.generation, left.step):
        return last.seats
    return ()


def _old(reports: Mapping[NodeId, Mapping[str, Any]]) -> list[OldShard]:
    found = list[OldShard]()
    for node, report in reports.items():
        kept = report.get("kept")
        if not kept:
            continue
        try:
            host, port = kept["store"]
            found += [
                OldShard(copy=Copy.from_json(c), host=str(host), port=int(port))
                for c in kept["copies"]
            ]
        except (KeyError, TypeError, ValueError, ProtocolError) as error:
            logger.error("node %s tells nonsense of the shards it keeps: %s", node, error)
    return found
