"""A link that stays broken costs one of its ends its place, and only then."""

from dataclasses import replace

import pytest

from ftkit.core import exit_codes
from ftkit.core.ids import Generation, MemberId, NodeId, Seat, Step
from ftkit.recovery.budget import BudgetConfig
from ftkit.recovery.facts import MemberFacts, Stage
from ftkit.recovery.partition import Cut, count, culprit, lasting
from ftkit.recovery.plan import Mode
from tests.recovery.stories import Story, training


def stands(seat: int, *cut: int, member: int | None = None) -> MemberFacts:
    return MemberFacts(
        member=MemberId(seat if member is None else member),
        seat=Seat(seat),
        node=NodeId(0),
        stage=Stage.HALTED,
        step=Step(5),
        cut=frozenset(MemberId(m) for m in cut),
    )


def counted(*halts: list[MemberFacts], steps: int = 0) -> list[tuple[tuple[int, int], int]]:
    """Pairs and their counts after these halts, `steps` committed between each two."""
    cuts: tuple[Cut, ...] = ()
    for i, standing in enumerate(halts):
        cuts = count(
            cuts, standing, step=Step(5 + i * steps), halted=Generation(i), progress_steps=10
        )
    return [(cut.seats, cut.times) for cut in cuts]


CUT = [stands(0, 1), stands(1, 0), stands(2)]


def test_what_breaks_in_a_row_is_counted_once_a_halt_whoever_says_so() -> None:
    one_sided = [stands(0), stands(1, 0), stands(2)]
    assert counted(CUT) == [((0, 1), 1)]
    assert counted(CUT, one_sided, CUT) == [((0, 1), 3)]
    again = count((), CUT, step=Step(5), halted=Generation(3), progress_steps=10)
    assert again == count(again, CUT, step=Step(5), halted=Generation(3), progress_steps=10)


def test_a_generation_that_ends_otherwise_and_progress_are_forgiving() -> None:
    whole = [stands(0), stands(1), stands(2)]
    assert counted(CUT, CUT, whole) == []
    assert counted(CUT, CUT, whole, CUT) == [((0, 1), 1)]
    assert counted(CUT, CUT, steps=9) == [((0, 1), 2)]
    assert counted(CUT, CUT, steps=10) == [((0, 1), 1)]


def test_a_member_that_is_gone_was_not_cut_off() -> None:
    assert counted([stands(0, 1), stands(2, 1)]) == []


def test_a_replacement_that_cannot_reach_the_same_seat_is_no_better() -> None:
    assert counted(CUT, [stands(0, 9), stands(1, 0, member=9), stands(2)]) == [((0, 1), 2)]


def named(*standing: MemberFacts, needed: frozenset[MemberId] = frozenset()) -> tuple[int, str]:
    cuts = count((), standing, step=Step(5), halted=Generation(1), progress_steps=10)
    cut = lasting(cuts, 1)
    assert cut is not None
    gone, reason = culprit(cut, standing, needed=needed)
    return gone.member, reason


def test_the_younger_end_goes_where_nothing_else_tells_them_apart() -> None:
    member, reason = named(*CUT)
    assert member == 1
    assert "between seats 0 and 1 was broken in 1 generations in a row" in reason
    assert "the younger of the two" in reason
    assert named(stands(0, 1, member=7), stands(1, 7), stands(2))[0] == 7


def test_the_end_that_more_cannot_reach_goes_though_it_is_the_older() -> None:
    member, reason = named(stands(0, 1, 2), stands(1, 0), stands(2, 0))
    assert member == 0
    assert "2 members cannot reach it, and 1 the other end" in reason


def test_the_last_one_with_state_stays() -> None:
    standing = stands(0, 1, 2), stands(1, 0), stands(2, 0)
    member, reason = named(*standing, needed=frozenset({MemberId(0)}))
    assert member == 1
    assert "seat 0 alone holds the state" in reason


# ---- the job


def halts_with_a_cut(story: Story, *ends: int) -> list[str]:
    """All members say that they stand still, these two with their link broken."""
    one, other = ends
    generation = Generation(story.generation)
    for seat in story.plan.seats:
        cut = {one: [MemberId(other)], other: [MemberId(one)]}.get(seat.member, [])
        if seat.member in story.world:
            story.says(seat.member, Stage.HALTED, generation=generation, cut=frozenset(cut))
    return story.moves()


def test_a_lasting_cut_costs_one_member_and_the_others_train_on() -> None:
    story = training(5)
    assert halts_with_a_cut(story, 0, 1) == ["halt", "resume"]
    assert halts_with_a_cut(story, 0, 1) == ["halt", "resume"]
    assert story.world == [0, 1, 2]
    assert halts_with_a_cut(story, 0, 1) == ["halt", "evict", "resume"]
    assert (story.world, story.plan.step) == ([0, 2], 5)
    assert "was broken in 3 generations in a row" in story.plan.evicted[MemberId(1)]
    assert story.plan.cuts == ()


def test_two_that_are_cut_off_from_each_other_leave_one() -> None:
    story = training(5, seats=2)
    moves = [halts_with_a_cut(story, 0, 1) for _ in range(3)]
    assert moves[-1] == ["halt", "evict", "resume"]
    assert story.world == [0]


def test_the_count_outlives_the_coordinator() -> None:
    story = training(5)
    halts_with_a_cut(story, 0, 1)
    (cut,) = story.plan.cuts
    assert type(story.plan).from_json(story.plan.to_json()).cuts == (cut,)


@pytest.mark.parametrize("stage", [Stage.READY, Stage.HALTED])
def test_ranks_that_never_reach_each_other_end_the_job_with_words(stage: Stage) -> None:
    story = Story(budget=BudgetConfig(cuts_max=2))
    for attempt in range(2):
        for seat in story.plan.seats:
            if seat.member not in story.facts.members:
                story.says(seat.member, Stage.READY, seat=seat.seat, generation=story.plan.halted)
        story.all_say(Stage.READY, generation=story.plan.halted)
        assert story.moves() == ["form"]
        one, other, third = story.world
        generation = Generation(story.generation)
        story.says(one, stage, generation=generation, cut=frozenset({MemberId(other)}))
        story.says(other, stage, generation=generation, cut=frozenset({MemberId(one)}))
        story.says(third, stage, generation=generation)
        if attempt == 0:
            assert story.moves() == ["halt", "restart"]
            story.all_say(Stage.DEAD, exit_code=1)
            assert story.moves() == ["respawn"] * 3
    assert story.moves() == ["halt", "end"]
    assert story.plan.mode is Mode.ENDED
    assert story.plan.stop is not None
    assert story.plan.stop.code == exit_codes.UNRECOVERABLE
    assert "seats 0 and 1 could not reach each other in 2 attempts" in story.plan.stop.reason


def test_facts_without_cuts_are_as_before() -> None:
    story = training(5)
    story.facts = replace(story.facts, members=dict(story.facts.members))
    story.says(0, Stage.DEAD, exit_code=-9)
    assert story.moves() == ["respawn"]
    assert story.plan.cuts == ()
