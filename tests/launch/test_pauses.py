"""How long those who train stand still to let somebody in, as the coordinator sees it."""

import pytest

from ftkit.core.ids import Generation, MemberId, NodeId, Seat, Step
from ftkit.core.world import Member, World
from ftkit.launch.pauses import Pauses
from ftkit.recovery.facts import JobFacts, MemberFacts, Stage
from ftkit.recovery.plan import Mode, Plan


def running(generation: int, size: int, *, resumed: int) -> Plan:
    there = [
        Member(member=MemberId(m), seat=Seat(m), node=NodeId(0), host="h", port=1)
        for m in range(size)
    ]
    world = World.of(Generation(generation), there)
    return Plan(mode=Mode.RUNNING, world=world, resumed=Generation(resumed))


def looks(*seen: tuple[Plan, int | None, float]) -> float | None:
    """What growth took, after these looks: a plan, the step that all play, the time."""
    pauses, played = Pauses(), 0
    for plan, step, now in seen:
        played = played if step is None else step
        there = {
            MemberId(m): MemberFacts(
                member=MemberId(m), seat=Seat(m), node=NodeId(0), stage=Stage.ACTIVE,
                at_step=Step(played), step=Step(0),
            )
            for m in range(2)
        }  # fmt: skip
        facts = JobFacts(members=there)
        pauses.look(plan, facts, None if step is None else Step(step), lambda size: 0.5, now)
    return pauses.measured["grow_s"]


SMALL, GROWN = running(2, 2, resumed=2), running(3, 3, resumed=2)


def test_a_growth_is_what_is_left_beside_the_steps() -> None:
    assert looks((SMALL, 7, 10.0), (GROWN, None, 10.4), (GROWN, 8, 12.0)) == 1.5


def test_a_growth_before_a_step_was_seen_is_measured_from_its_decision() -> None:
    stale = (GROWN, 7, 10.4), (GROWN, None, 11.0), (GROWN, 7, 11.5)
    assert looks((SMALL, None, 10.0), *stale, (GROWN, 8, 12.0)) == pytest.approx(1.6 - 0.5)


def test_a_world_that_was_resumed_did_not_grow() -> None:
    again = running(4, 2, resumed=4)
    assert looks((SMALL, None, 10.0), (again, None, 10.4), (again, 8, 12.0)) is None
