"""Whom a job that recovers waits for in vain, and for how long it does."""

from dataclasses import replace

import pytest

from ftkit.core.ids import Generation, MemberId, NodeId, Seat, Step
from ftkit.core.world import Member, World
from ftkit.recovery.deadlines import RESTORE_LIMITS, keeps_out, latecomers, restless
from ftkit.recovery.facts import MemberFacts, Stage
from ftkit.recovery.plan import Assignment, Mode, Plan

LIMIT_S, HALT_S = 30.0, 5.0


def member(number: int, stage: Stage, generation: int = 1, **fields: object) -> MemberFacts:
    return MemberFacts(
        member=MemberId(number),
        seat=Seat(number),
        node=NodeId(number),
        stage=stage,
        generation=Generation(generation),
        **fields,  # type: ignore[arg-type]
    )


def plan(mode: Mode) -> Plan:
    seats = [Assignment(seat=Seat(n), member=MemberId(n), node=NodeId(n)) for n in range(3)]
    return replace(Plan(), mode=mode, seats=tuple(seats), halted=Generation(1))


def named(
    members: list[MemberFacts], mode: Mode, seconds: float, away: frozenset[NodeId] = frozenset()
) -> set[int]:
    found = restless(
        plan(mode), members, halting_s=seconds, standing_s=seconds, halt_s=HALT_S,
        limit_s=LIMIT_S, away=away,
    )  # fmt: skip
    return set(found)


@pytest.mark.parametrize("stage", [Stage.ACTIVE, Stage.READY])
def test_who_does_not_say_where_it_stands_is_waited_for_shortly(stage: Stage) -> None:
    generation = 1 if stage is Stage.ACTIVE else 0
    members = [member(0, stage, generation), member(1, Stage.HALTED)]
    assert named(members, Mode.HALTING, 0.9 * HALT_S) == set()
    assert named(members, Mode.HALTING, 1.1 * HALT_S) == {0}
    assert named(members, Mode.FORMING, 1.1 * HALT_S) == set()


def test_who_has_no_seat_any_more_is_waited_for_by_nobody() -> None:
    assert named([member(7, Stage.ACTIVE)], Mode.HALTING, 100) == set()


def test_who_keeps_its_shards_is_waited_for_as_long_as_in_a_step() -> None:
    keeps = member(0, Stage.HALTED, sharded=True, stepping=True)
    for mode in (Mode.HALTING, Mode.FORMING):
        assert named([keeps], mode, 0.9 * LIMIT_S) == set()
        assert named([keeps], mode, 1.1 * LIMIT_S) == {0}
        assert named([keeps], mode, 1.1 * LIMIT_S, frozenset({NodeId(0)})) == set(), "not told"
        for lets_go in (replace(keeps, sharded=False), replace(keeps, stepping=False)):
            assert named([lets_go], mode, 1.1 * LIMIT_S) == set()


WORLD = World.of(
    Generation(2),
    [Member(member=MemberId(n), seat=Seat(n), node=NodeId(n), host="h", port=1) for n in range(3)],
)


def late(
    members: list[MemberFacts],
    waited_s: float,
    *,
    waiting: set[int] = set(),  # noqa: B006  # never changed
    away: frozenset[NodeId] = frozenset(),
) -> set[int]:
    found = latecomers(
        WORLD, members, waited_s=waited_s, limit_s=LIMIT_S, away=away,
        waiting={MemberId(n) for n in waiting},
    )  # fmt: skip
    return set(found)


def test_who_does_not_enter_the_world_is_late() -> None:
    members = [member(0, Stage.ACTIVE, 2, step=Step(5)), member(1, Stage.HALTED, 1)]
    assert late(members, 0.9 * LIMIT_S) == set()
    assert late(members, 1.1 * LIMIT_S) == {1}
    assert late(members, 1.1 * LIMIT_S, away=frozenset({NodeId(0)})) == set()


def test_of_those_that_have_not_said_that_they_loaded_the_one_that_works_is_late() -> None:
    members = [member(n, Stage.ACTIVE, 2) for n in range(3)]
    assert late(members, 0.9 * RESTORE_LIMITS * LIMIT_S, waiting={1, 2}) == set()
    # The others have loaded, and wait for it in a collective.
    assert late(members, 1.1 * RESTORE_LIMITS * LIMIT_S, waiting={1, 2}) == {0}
    assert late(members, 1.1 * RESTORE_LIMITS * LIMIT_S, waiting={0, 1, 2}) == {0, 1, 2}


def test_one_that_stands_still_alone_is_in_the_way_of_those_that_wait_to_be_let_in() -> None:
    world = World.of(Generation(2), WORLD.members[:1])
    alone, linked = member(0, Stage.ACTIVE, 2), member(5, Stage.LINKED)
    assert set(keeps_out(world, [alone, linked])) == {0}
    assert keeps_out(world, [alone]) == {}, "nobody waits"
    assert keeps_out(world, [alone, replace(linked, stage=Stage.READY)]) == {}
    assert keeps_out(WORLD, [alone, linked]) == {}, "those of its world name who it is"
