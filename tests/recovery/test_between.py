"""Whether ranks are between two worlds: who is started meanwhile waits for them."""

from typing import Any

import pytest

from ftkit.core.ids import Generation, MemberId, NodeId, Seat, Step
from ftkit.core.world import Member, World
from ftkit.recovery.between import between_worlds
from ftkit.recovery.facts import MemberFacts, Stage
from ftkit.recovery.plan import Mode, Plan


def world(generation: int, *members: int) -> World:
    there = [
        Member(member=MemberId(m), seat=Seat(m), node=NodeId(0), host="h", port=1) for m in members
    ]
    return World.of(Generation(generation), there)


def rank(member: int, stage: Stage, **more: Any) -> MemberFacts:
    return MemberFacts(
        member=MemberId(member), seat=Seat(member), node=NodeId(0), stage=stage, **more
    )


OLD, NEW = Generation(1), Generation(2)
SHARDED = {"sharded": True}


@pytest.mark.parametrize(
    ("mode", "members", "wanted"),
    [
        (Mode.HALTING, [rank(0, Stage.HALTED), rank(1, Stage.DEAD)], True),
        (Mode.HALTING, [rank(0, Stage.DEAD)], False),
        (Mode.HALTING, [rank(0, Stage.READY, **SHARDED)], True),
        (Mode.HALTING, [rank(0, Stage.READY)], False),
        (Mode.FORMING, [rank(0, Stage.READY, **SHARDED)], True),
        (Mode.FORMING, [rank(0, Stage.READY)], False),
        (Mode.RUNNING, [rank(0, Stage.HALTED, generation=OLD)], True),
        (Mode.RUNNING, [rank(0, Stage.ACTIVE, generation=NEW)], False),
        (Mode.RUNNING, [rank(0, Stage.ACTIVE, generation=NEW, **SHARDED)], True),
        (Mode.RUNNING, [rank(0, Stage.ACTIVE, generation=NEW, step=Step(7), **SHARDED)], False),
        (Mode.RUNNING, [rank(9, Stage.HALTED, generation=OLD)], False),
    ],
)
def test_survivors_are_between_worlds_until_they_have_their_state(
    mode: Mode, members: list[MemberFacts], wanted: bool
) -> None:
    assert between_worlds(Plan(mode=mode, world=world(2, 0, 1)), members) == wanted


def test_who_lets_a_spare_in_is_not_disturbed_by_the_next_one() -> None:
    member = rank(0, Stage.ACTIVE, generation=NEW)
    letting_in = Plan(mode=Mode.RUNNING, world=world(2, 0, 1), joining=world(3, 0, 1, 2))
    assert between_worlds(letting_in, [member])
    assert not between_worlds(letting_in.revised(joining=None), [member])
    assert not between_worlds(letting_in, [rank(9, Stage.ACTIVE, generation=NEW)])


def test_at_the_start_of_a_job_nobody_is_waited_for() -> None:
    assert not between_worlds(Plan(mode=Mode.FORMING), [rank(0, Stage.READY, **SHARDED)])
