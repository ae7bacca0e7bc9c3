"""Jobs as their agents tell of them, written out: three nodes, a rank on each, all of them training."""

from dataclasses import replace

from ftkit.core.ids import Generation, MemberId, NodeId, Seat, Step
from ftkit.core.world import Member, World
from ftkit.launch.programme.costs import Budget
from ftkit.launch.programme.guards import Guards
from ftkit.launch.programme.job_state import JobState, NodeState
from ftkit.launch.programme.record import DrillRecord, Survival
from ftkit.launch.programme.targets import Target
from ftkit.recovery.facts import MemberFacts, Stage
from ftkit.recovery.plan import Assignment, Mode, Plan

GENERATION = Generation(3)
NAMES = ("alpha", "beta", "gamma")
GUARDS = Guards(budget=Budget(lost_s=300, window_s=86400), steps_between=100)


def member(number: int, **changes: object) -> MemberFacts:
    base = MemberFacts(
        member=MemberId(number),
        seat=Seat(number),
        node=NodeId(number),
        stage=Stage.ACTIVE,
        generation=GENERATION,
        entry_step=Step(0),
        at_step=Step(501),
        stepping=True,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def plan(ranks: int = 3, **changes: object) -> Plan:
    world = World(
        generation=GENERATION,
        members=tuple(
            Member(member=MemberId(n), seat=Seat(n), node=NodeId(n), host="h", port=1)
            for n in range(ranks)
        ),
    )
    seats = tuple(
        Assignment(seat=Seat(n), node=NodeId(n), member=MemberId(n)) for n in range(ranks)
    )
    return replace(
        Plan(version=7, mode=Mode.RUNNING, seats=seats, world=world),
        **changes,  # type: ignore[arg-type]
    )


def job(
    plan_: Plan | None = None,
    *,
    members: dict[int, MemberFacts] = {},  # noqa: B006  # never changed
    nodes: dict[int, dict[str, object]] = {},  # noqa: B006
    silent: dict[int, str] = {},  # noqa: B006
    **changes: object,
) -> JobState:
    """A job in which all is well, but for what is given by member and by node."""
    known = plan() if plan_ is None else plan_
    ranks = 0 if known.world is None else len(known.world.members)
    states = {}
    for n in range(max(ranks, 3)):
        here = [members.get(n, member(n))] if n < ranks or n in members else []
        state = NodeState(
            node=NodeId(n),
            name=NAMES[n],
            order=known.order,
            members=tuple(here),
            versions={"ftkit": "1", "torch": "2"},
            plan=known if n == 0 else None,
        )
        states[NodeId(n)] = replace(state, **nodes.get(n, {}))  # type: ignore[arg-type]
    for n in silent:
        del states[NodeId(n)]
    base = JobState(seats=3, nodes=states, silent={NodeId(n): why for n, why in silent.items()})
    return replace(base, **changes)  # type: ignore[arg-type]


def target(fault: str = "kill", number: int = 1) -> Target:
    return Target(
        fault=fault,
        node=NodeId(number),
        seats=(Seat(number),),
        members=(MemberId(number),),
        generation=GENERATION,
        order=plan().order,
    )


def drill(at: float, fault: str = "kill", **changes: object) -> DrillRecord:
    base = DrillRecord(
        at=at,
        job="j",
        fault=fault,
        outcome=Survival.SURVIVED,
        node="beta",
        seats=(1,),
        world=3,
        nodes=3,
        engine="embedded",
        step=500,
        next_step_s=0.4,
        whole_s=2.0,
        lost_s=1.5,
        versions={"ftkit": "1"},
    )
    return replace(base, **changes)  # type: ignore[arg-type]
