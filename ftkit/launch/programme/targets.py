"""Targets: whom a fault may strike, and whom the dice pick. Pure."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ftkit.core.ids import Generation, MemberId, NodeId, Seat
from ftkit.launch.drill_faults import OF_NODES
from ftkit.launch.programme.job_state import JobState


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What is done to whom. It holds for the plan with this order, and for no other."""

    fault: str
    node: NodeId
    seats: tuple[Seat, ...]
    members: tuple[MemberId, ...]
    generation: Generation
    """Of the world that trains."""
    order: tuple[int, int]
    beside: tuple[MemberId, ...] = ()
    """Who does not train and goes with the node."""

    @property
    def words(self) -> str:
        """As a person reads it."""
        ranks = ", ".join(str(s) for s in self.seats)
        whose = f"node {self.node} with rank {ranks}" if self.fault in OF_NODES else f"rank {ranks}"
        return f"{self.fault} of {whose}"


def targets(fault: str, job: JobState) -> Sequence[Target]:
    """All that the fault may strike, in the order of nodes and seats; none while nobody trains."""
    plan = job.plan
    if plan is None or plan.world is None:
        return []
    generation, order = plan.world.generation, plan.order

    def target(node: NodeId, members: Sequence[MemberId], seats: Sequence[Seat]) -> Target:
        return Target(
            fault=fault,
            node=node,
            seats=tuple(seats),
            members=tuple(members),
            generation=generation,
            order=order,
        )

    world = sorted(job.world, key=lambda m: m.seat)
    if fault not in OF_NODES:
        return [target(m.node, [m.member], [m.seat]) for m in world]
    found = []
    for node in sorted({m.node for m in world}):
        here = [m for m in world if m.node == node]
        beside = sorted(m.member for m in job.nodes[node].members if m not in here)
        one = target(node, [m.member for m in here], [m.seat for m in here])
        found.append(replace(one, beside=tuple(beside)))
    return found


def choose(fault: str, job: JobState, *, seed: int, number: int) -> Target | None:
    """The one that the seed picks in an interval, of this job as it stands; None: there is none."""
    every = targets(fault, job)
    return random.Random(f"target {seed} {number} {fault}").choice(every) if every else None
