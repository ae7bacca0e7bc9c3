"""The protocol's moves, as stories of what goes wrong."""

from dataclasses import replace

import pytest

from ftkit.core import exit_codes
from ftkit.core.ids import Boot, Generation, MemberId, NodeId, Step, Term
from ftkit.recovery.budget import BudgetConfig
from ftkit.recovery.facts import Stage
from ftkit.recovery.plan import Mode, Stop, adopt, first_plan
from ftkit.recovery.protocol import RESTART, advance, gone
from tests.recovery.stories import Story, newcomer, training


def test_a_job_forms_once_every_seat_is_ready() -> None:
    story = Story()
    story.says(0, Stage.READY).says(1, Stage.READY)
    assert story.moves() == []
    story.says(2, Stage.READY)
    assert story.moves() == ["form"]
    assert (story.world, story.generation, story.plan.step) == ([0, 1, 2], 1, 0)


def test_one_is_killed_and_the_others_play_the_step_again() -> None:
    story = training(5)
    story.says(0, Stage.DEAD, exit_code=-9)
    assert story.moves() == ["respawn"]
    assert story.plan.mode is Mode.HALTING
    assert story.plan.halted == 1
    story.says(1, Stage.HALTED)
    assert story.moves() == [], "member 2 has not said where it stands"
    story.says(2, Stage.HALTED, voted=True)
    assert story.moves() == ["resume"]
    assert (story.world, story.plan.step) == ([1, 2], 5)
    assert story.plan.seats[0].member == 3


def test_two_are_killed_together() -> None:
    story = training(5)
    story.says(0, Stage.DEAD, exit_code=-9).says(2, Stage.DEAD, exit_code=-9)
    assert story.moves() == ["respawn", "respawn"]
    story.says(1, Stage.HALTED)
    assert story.moves() == ["resume"]
    assert story.world == [1]


def test_many_that_die_together_are_replaced_in_one_move() -> None:
    story = training(seats=40)
    for member in range(0, 40, 2):
        story.says(member, Stage.DEAD, exit_code=-9)
    version = story.plan.version
    assert story.moves() == ["respawn"] * 20
    assert story.plan.version == version + 1, "the facts are not looked through once for each"
    assert [s.member for s in story.plan.seats[::2]] == list(range(40, 60))
    assert (story.plan.mode, story.plan.restarts) == (Mode.HALTING, 20)
    assert story.plan.next_member == 60


def test_the_budget_counts_those_that_die_together() -> None:
    story = training(seats=40)
    story.budget = BudgetConfig(restarts_max=19)
    for member in range(0, 40, 2):
        story.says(member, Stage.DEAD, exit_code=-9)
    assert story.moves() == ["end"], "nobody is replaced in a job that ends"
    assert story.plan.stop is not None
    assert story.plan.stop.reason.startswith("19 processes were replaced")


def test_between_vote_and_commit_those_behind_roll_forward() -> None:
    story = training(5)
    story.says(0, Stage.DEAD, exit_code=-9)
    story.says(1, Stage.HALTED, step=Step(6)).says(2, Stage.HALTED, step=Step(5), voted=True)
    assert story.moves() == ["respawn", "resume"]
    assert story.plan.step == 6


def test_a_second_loss_while_members_resume() -> None:
    story = training(5)
    story.says(0, Stage.DEAD, exit_code=-9)
    story.says(1, Stage.HALTED, step=Step(6)).says(2, Stage.HALTED, voted=True)
    story.moves()
    # 1 is in generation 2 already; 2 dies having never entered it.
    story.says(1, Stage.ACTIVE, generation=Generation(2)).says(2, Stage.DEAD, exit_code=-9)
    assert story.moves() == ["respawn"]
    story.says(1, Stage.HALTED)
    assert story.moves() == ["resume"]
    assert (story.world, story.plan.step, story.generation) == ([1], 6, 3)


def test_a_member_on_its_way_into_a_world_does_not_break_it() -> None:
    story = training(5)
    story.says(0, Stage.DEAD, exit_code=-9).moves()
    story.says(1, Stage.HALTED).says(2, Stage.HALTED).moves()
    story.says(1, Stage.ACTIVE, generation=Generation(2))
    assert story.plan.mode is Mode.RUNNING
    assert story.moves() == [], "member 2 still says HALTED, of generation 1"


def test_a_newcomer_is_admitted_by_the_vote() -> None:
    story = newcomer()
    assert story.moves() == ["join"]
    assert story.plan.joining is not None
    assert story.plan.joining.generation == 3
    assert story.plan.resumed == 2
    story.says(1, Stage.ACTIVE, generation=Generation(3), step=Step(6))
    assert story.moves() == ["grown"]
    assert (story.world, story.generation, story.plan.resumed) == ([3, 1, 2], 3, 2)


def test_a_newcomer_that_dies_while_linking_costs_the_others_nothing() -> None:
    story = newcomer()
    story.says(3, Stage.DEAD, exit_code=1)
    assert story.moves() == ["respawn"]
    assert story.plan.mode is Mode.RUNNING
    assert story.plan.seats[0].member == 4


def test_a_newcomer_that_dies_while_members_prepare_is_withdrawn() -> None:
    story = newcomer()
    story.moves()
    story.says(3, Stage.DEAD, exit_code=1)
    assert story.moves() == ["respawn", "withdraw"]
    assert story.plan.joining is None
    assert story.plan.mode is Mode.RUNNING


def test_an_offer_is_withdrawn_from_seats_given_away_even_if_nobody_remembers_why() -> None:
    story = newcomer()
    story.moves()
    offered = story.plan
    story.says(3, Stage.DEAD, exit_code=1).moves()
    reseated = offered.revised(seats=story.plan.seats)
    facts = story.knows(members={m: f for m, f in story.facts.members.items() if m != 3}).facts
    after, decisions = advance(reseated, facts, story.budget)
    assert [d.action for d in decisions] == ["withdraw"]
    assert after.joining is None


def test_a_newcomer_that_loses_a_link_while_it_waits_makes_room_and_is_offered_again() -> None:
    story = newcomer()
    story.moves()
    story.says(3, Stage.READY, linked=Generation(0))
    assert story.moves() == ["withdraw"]
    story.says(3, Stage.LINKED, linked=Generation(2))
    assert story.moves() == ["join"]
    assert story.plan.joining is not None
    assert story.plan.joining.generation == 4


def test_members_that_switch_to_a_withdrawn_world_are_called_back() -> None:
    story = newcomer()
    story.moves()
    story.says(3, Stage.DEAD, exit_code=1).moves()
    story.says(1, Stage.ACTIVE, generation=Generation(3), step=Step(6))
    assert story.moves() == ["halt"]


def test_members_in_a_withdrawn_world_are_seen_behind_a_newer_offer() -> None:
    story = newcomer()
    story.moves()
    story.says(3, Stage.READY, linked=Generation(0)).moves()
    story.says(3, Stage.LINKED, linked=Generation(2)).moves()
    assert story.plan.joining is not None
    story.says(1, Stage.ACTIVE, generation=Generation(3), step=Step(6))
    assert story.plan.joining.generation > 3
    assert story.moves() == ["halt"]


def test_a_newcomer_that_dies_just_admitted_breaks_the_grown_world() -> None:
    story = newcomer()
    story.moves()
    story.says(1, Stage.ACTIVE, generation=Generation(3), step=Step(6))
    story.says(2, Stage.ACTIVE, generation=Generation(3), step=Step(6))
    story.says(3, Stage.DEAD, exit_code=-9)
    story.moves()
    story.says(1, Stage.HALTED).says(2, Stage.HALTED)
    story.moves()
    assert (story.plan.mode, story.world, story.plan.step) == (Mode.RUNNING, [1, 2], 6)


def test_a_newcomer_that_switched_counts_as_a_survivor_before_the_plan_knows() -> None:
    story = newcomer()
    story.moves()
    # All three switched and committed step 7 there; the members of old die before they say so.
    story.says(1, Stage.DEAD, exit_code=-9).says(2, Stage.DEAD, exit_code=-9)
    story.says(3, Stage.HALTED, generation=Generation(3), step=Step(7))
    story.moves()
    assert (story.plan.mode, story.world, story.plan.step) == (Mode.RUNNING, [3], 7)


def test_a_member_left_behind_in_the_older_world_breaks_one_that_grew() -> None:
    story = newcomer()
    story.moves()
    story.says(1, Stage.ACTIVE, generation=Generation(3), step=Step(6))
    assert story.moves() == ["grown"]
    story.says(2, Stage.HALTED, generation=Generation(2), step=Step(5), voted=True)
    assert story.moves() == ["halt"]


def test_a_newcomer_that_missed_its_admission_breaks_the_grown_world() -> None:
    story = newcomer()
    story.moves()
    story.says(1, Stage.ACTIVE, generation=Generation(3), step=Step(6))
    assert story.moves() == ["grown"]
    assert story.moves() == [], "it is LINKED still: its admission may be on the way"
    story.says(3, Stage.READY, linked=Generation(0))
    assert story.moves() == ["halt"]


@pytest.mark.parametrize("stage", [Stage.HALTED, Stage.READY])
def test_a_world_breaks_too_where_nobody_had_state_yet(stage: Stage) -> None:
    story = Story()
    story.all_say(Stage.READY).moves()
    story.all_say(Stage.ACTIVE, generation=Generation(1))
    story.all_say(stage)
    assert story.moves() == ["halt", "restart"]
    assert set(story.plan.evicted) == {0, 1, 2}


def test_a_loss_during_set_up_restarts_everybody_without_blame() -> None:
    story = Story(budget=BudgetConfig(same_place_max=2))
    story.all_say(Stage.READY).moves()
    story.all_say(Stage.ACTIVE, generation=Generation(1))
    story.says(0, Stage.DEAD, exit_code=-9).says(1, Stage.HALTED).says(2, Stage.HALTED)
    assert story.moves() == ["respawn", "restart"]
    assert story.plan.evicted == {1: RESTART, 2: RESTART}
    story.says(1, Stage.DEAD, exit_code=1).says(2, Stage.DEAD, exit_code=1)
    assert story.moves() == ["respawn", "respawn"]
    assert [s.failures for s in story.plan.seats] == [1, 0, 0]


def test_those_told_to_start_over_have_not_finished_when_they_exit_with_0() -> None:
    story = Story()
    story.all_say(Stage.READY).moves()
    story.all_say(Stage.ACTIVE, generation=Generation(1))
    story.all_say(Stage.HALTED).moves()
    story.all_say(Stage.FINISHED, exit_code=0)
    assert story.moves() == ["respawn"] * 3
    assert story.plan.mode is Mode.FORMING


def test_the_same_place_three_times_stops_the_job_and_says_why() -> None:
    story = training(5)
    for death in range(3):
        seat = story.plan.seats[0]
        if seat.member not in story.facts.members:
            story.says(seat.member, Stage.READY, seat=0)
        story.says(seat.member, Stage.DEAD, exit_code=7, error="boom")
        story.moves()
        assert (story.plan.mode is Mode.ENDED) == (death == 2)
    assert story.plan.stop is not None
    assert story.plan.stop.code == 7
    assert "seat 0 failed 3 times" in story.plan.stop.reason
    assert "boom" in story.plan.stop.reason


def fails_at_once(story: Story, member: int) -> None:
    """The newest process of seat 2 joins, and dies before it has got anywhere."""
    story.says(member, Stage.READY, seat=2, entry_step=Step(5))
    story.says(member, Stage.DEAD, exit_code=1, at_step=Step(6))


def test_a_seat_whose_replacement_failed_too_stays_empty_for_a_while() -> None:
    story = training(5)
    story.says(2, Stage.DEAD, exit_code=1, at_step=Step(6))
    story.knows(dead_s={MemberId(2): 0.0})
    assert "respawn" in story.moves(), "the first is made good at once"
    fails_at_once(story, 3)
    story.knows(dead_s={MemberId(2): 1.0, MemberId(3): 0.0})
    assert "respawn" not in story.moves()
    story.knows(dead_s={MemberId(3): 2.0})
    assert story.moves() == ["respawn"]
    fails_at_once(story, 4)
    story.knows(dead_s={MemberId(4): 0.0})
    assert story.moves() == ["end"], "where no retry helps, nobody waits for one"


def test_a_replacement_that_trained_for_a_while_is_replaced_at_once() -> None:
    story = training(5)
    story.says(2, Stage.DEAD, exit_code=1, at_step=Step(6))
    story.knows(dead_s={MemberId(2): 0.0})
    story.moves()
    story.says(3, Stage.READY, seat=2, entry_step=Step(5))
    story.says(3, Stage.DEAD, exit_code=1, at_step=Step(60))
    story.knows(dead_s={MemberId(3): 0.0})
    assert "respawn" in story.moves()


def test_what_failed_twice_in_one_place_is_tried_in_another() -> None:
    story = training(5, nodes=2, seats=1)
    story.budget = BudgetConfig(same_place_max=5)
    boots = {NodeId(n): Boot(f"b{n}") for n in range(3)}
    story.knows(per_node=1, boots=boots)
    story.moves()
    for member, node in ((1, 1), (2, 1), (3, 2)):
        story.says(member, Stage.DEAD, exit_code=1, at_step=Step(6), entry_step=Step(5), seat=1)
        assert "respawn" in story.moves()
        assert story.plan.seats[1].node == node


def test_a_script_that_fails_before_hello_stops_the_job_with_its_own_words() -> None:
    story = Story()
    story.says(1, Stage.DEAD, exit_code=3, error="NameError: x")
    assert story.moves() == ["end"]
    assert story.plan.stop is not None
    assert story.plan.stop.code == 3
    assert "seat 1 exited with 3" in story.plan.stop.reason
    assert "NameError: x" in story.plan.stop.reason


@pytest.mark.parametrize("evicted", [False, True])
def test_before_hello_what_the_script_did_not_cause_is_replaced(evicted: bool) -> None:
    story = Story()
    if evicted:
        story.knows(evictions={MemberId(1): "stopped"}).moves()
    story.says(1, Stage.DEAD, exit_code=-9 if evicted else None)
    assert story.moves() == ["respawn"]


def test_the_job_is_over_when_the_world_is_though_a_newcomer_waits() -> None:
    story = newcomer()
    story.says(1, Stage.FINISHED, exit_code=0).says(2, Stage.DONE)
    assert "end" not in story.moves()
    story.says(2, Stage.FINISHED, exit_code=0)
    assert story.moves() == ["end"]
    assert story.plan.stop is not None
    assert story.plan.stop.code == 0


def test_finishing_comes_before_blaming_a_newcomer() -> None:
    story = newcomer()
    story.budget = BudgetConfig(restarts_max=1)
    story.says(1, Stage.FINISHED, exit_code=0).says(2, Stage.FINISHED, exit_code=0)
    story.says(3, Stage.DEAD, exit_code=1)
    assert story.moves() == ["end"]
    assert story.plan.stop is not None
    assert story.plan.stop.code == 0


@pytest.mark.parametrize("stage", [Stage.DONE, Stage.FINISHED])
def test_whoever_is_through_is_a_witness_of_the_last_vote(stage: Stage) -> None:
    story = training(9)
    story.says(0, stage, step=Step(10))
    story.says(1, Stage.HALTED, voted=True).says(2, Stage.HALTED, voted=True)
    assert story.moves() == ["halt", "resume"]
    assert (story.world, story.plan.step) == ([1, 2], 10)


def test_all_are_gone_and_the_newest_snapshot_is_the_beginning() -> None:
    story = training(5)
    for member in range(3):
        story.says(member, Stage.DEAD, exit_code=-9)
    assert story.moves() == ["respawn"] * 3 + ["reform"]
    story.knows(snapshots=frozenset({Step(4), Step(3)}))
    for seat in story.plan.seats:
        story.says(seat.member, Stage.READY, seat=seat.seat)
    assert story.moves() == [], "they have not acknowledged that generation 1 is over"
    story.all_say(Stage.READY, generation=Generation(1))
    story.knows(awaited="step 6 is rebuilt from parity")
    assert story.moves() == [], "something newer will be there soon"
    story.knows(awaited="")
    assert story.moves() == ["form"]
    assert story.plan.step == 4


def test_a_stopped_member_is_waited_for_until_it_is_evicted() -> None:
    story = training(5)
    story.says(0, Stage.HALTED).says(1, Stage.HALTED)
    assert story.moves() == ["halt"]
    story.knows(evictions={MemberId(2): "stopped for 3.0 s"})
    assert story.moves() == ["evict", "resume"]
    assert story.world == [0, 1]
    assert story.plan.seats[2].member == 2, "the seat waits for the process to be gone"
    story.says(2, Stage.DEAD, exit_code=-9)
    assert story.moves() == ["respawn"]


def test_who_cannot_be_told_is_given_no_world_to_enter() -> None:
    story = training(5, nodes=2, seats=2)
    for member in range(4):
        story.says(member, Stage.HALTED)
    # All had said where they stand; then the connection to their agent broke.
    story.knows(nodes_away=frozenset({NodeId(1)}))
    assert story.moves() == ["halt"]
    story.knows(nodes_away=frozenset(), nodes_lost=frozenset({NodeId(1)}))
    assert story.moves() == ["resume"]
    assert story.world == [0, 1]


def test_who_is_in_reach_again_goes_on_with_the_others() -> None:
    story = training(5, nodes=2, seats=2)
    for member in range(4):
        story.says(member, Stage.HALTED)
    story.knows(nodes_away=frozenset({NodeId(1)}))
    assert story.moves() == ["halt"]
    story.knows(nodes_away=frozenset())
    assert story.moves() == ["resume"]
    assert story.world == [0, 1, 2, 3]


def test_a_member_of_an_unreachable_node_does_not_bring_its_fork_back() -> None:
    story = training(5, nodes=2, seats=2)
    story.knows(nodes_lost=frozenset({NodeId(1)}))
    story.says(0, Stage.HALTED, voted=True).says(1, Stage.HALTED, voted=True)
    assert story.moves() == ["halt", "resume"]
    assert (story.world, story.plan.step) == ([0, 1], 5)
    # Node 1 is back: there the vote had passed. The others have played the step again.
    story.knows(nodes_lost=frozenset())
    for member in (0, 1):
        story.says(member, Stage.HALTED, generation=Generation(2), step=Step(5), voted=False)
    for member in (2, 3):
        story.says(member, Stage.HALTED, generation=Generation(2), step=Step(6))
    assert story.moves() == ["halt", "resume"]
    assert (story.world, story.plan.step) == ([0, 1], 5)


def test_the_last_survivor_comes_back_while_the_job_forms_anew() -> None:
    story = training(5, nodes=2, seats=1)
    story.knows(nodes_lost=frozenset({NodeId(1)}))
    story.says(0, Stage.DEAD, exit_code=-9)
    assert story.moves() == ["respawn", "reform"]
    story.knows(nodes_lost=frozenset())
    story.says(1, Stage.HALTED)
    assert story.moves() == ["resume"]
    assert (story.world, story.plan.step) == ([1], 5)


@pytest.mark.parametrize("stage", [Stage.HALTED, Stage.READY])
def test_a_set_up_torn_on_an_unreachable_node_is_not_let_in_later(stage: Stage) -> None:
    story = Story(nodes=2, seats=1)
    story.all_say(Stage.READY).moves()
    story.all_say(Stage.ACTIVE, generation=Generation(1))
    story.knows(nodes_lost=frozenset({NodeId(1)})).says(0, Stage.DEAD, exit_code=-9)
    assert story.moves() == ["respawn", "reform"]
    story.knows(nodes_lost=frozenset()).says(1, stage)
    story.says(2, Stage.READY, seat=0, generation=Generation(1))
    assert story.moves() == ["restart"]
    assert story.plan.evicted == {1: RESTART}


def test_a_member_with_older_state_starts_over_while_the_job_forms_anew() -> None:
    story = training(5, nodes=2, seats=1)
    story.knows(nodes_lost=frozenset({NodeId(1)}))
    story.says(0, Stage.HALTED)
    assert story.moves() == ["halt", "resume"]
    story.says(0, Stage.DEAD, exit_code=-9)
    assert story.moves() == ["respawn", "reform"]
    story.knows(nodes_lost=frozenset())
    story.says(1, Stage.HALTED, generation=Generation(2))
    assert story.moves() == ["restart"]
    assert story.plan.evicted == {1: RESTART}


def test_a_new_coordinator_waits_for_the_agents_it_has_not_heard() -> None:
    story = training(5, nodes=2, seats=1)
    story.says(0, Stage.HALTED)
    story.moves()
    heard = {m: f for m, f in story.facts.members.items() if f.node == 0}
    story.plan = adopt([story.plan], term=Term(2))
    story.knows(members=heard).says(0, Stage.HALTED, generation=story.plan.halted)
    assert story.moves() == []
    story.knows(nodes_lost=frozenset({NodeId(1)}))
    assert story.moves() == ["resume"]


def test_a_takeover_from_an_older_copy_ends_what_it_does_not_know() -> None:
    story = training(5)
    story.says(0, Stage.DEAD, exit_code=-9).moves()
    old_copy = story.plan
    story.says(1, Stage.HALTED).says(2, Stage.HALTED).moves()
    issued = story.generation
    for member in (1, 2):
        story.says(member, Stage.ACTIVE, generation=Generation(issued))
    story.plan = adopt([old_copy], term=Term(2))
    assert story.moves() == []
    assert story.plan.halted >= issued, "so that members working there will stand still"
    for member in (1, 2):
        story.says(member, Stage.HALTED, generation=story.plan.halted, step=Step(8))
    assert story.moves() == ["resume"]
    assert story.generation > issued
    assert story.plan.step == 8


def test_a_takeover_does_not_rely_on_what_was_said_to_the_predecessor() -> None:
    story = training(5)
    story.says(0, Stage.DEAD, exit_code=-9).moves()
    story.says(1, Stage.HALTED).says(2, Stage.HALTED)
    # The predecessor resumed them and died; that plan reaches them before this one's.
    story.plan = adopt([story.plan], term=Term(2))
    assert story.moves() == []
    assert story.plan.halted > 1


def test_a_takeover_takes_the_newest_copy_and_issues_no_number_twice() -> None:
    story = training(5)
    older = story.plan
    story.says(0, Stage.DEAD, exit_code=-9).moves()
    taken = adopt([older, story.plan, older], term=Term(1))
    assert taken.mode is Mode.HALTING
    assert taken.order > story.plan.order
    assert taken.term == 2, "higher than the copy's, whatever the engine counted"
    assert taken.next_generation > story.plan.next_generation + 1000
    assert taken.next_member > story.plan.next_member + 1000
    again = first_plan(1, 3, term=Term(2))
    assert {s.member for s in again.seats}.isdisjoint(s.member for s in story.plan.seats)


def test_a_takeover_starts_no_member_that_a_lost_agent_may_have_started() -> None:
    """The predecessor had an agent start its seats; both died before another saw that plan."""
    begun = first_plan(2, 1, term=Term(1))
    assert all(s.boot is None for s in begun.seats)
    taken = adopt([begun], term=Term(2))
    members = [s.member for s in taken.seats]
    assert len(set(members)) == 2
    assert {s.member for s in begun.seats}.isdisjoint(members)
    assert taken.next_member > max(members)
    # Who started a member and lives holds the plan that says so.
    known = replace(begun, seats=tuple(replace(s, boot=Boot("b")) for s in begun.seats))
    assert [s.member for s in adopt([begun, known.revised()], term=Term(2)).seats] == [0, 1]


def test_an_interrupted_job_ends_and_stays_ended() -> None:
    story = training(5)
    story.knows(interrupted="Ctrl-C")
    assert story.moves() == ["end"]
    ended = story.plan
    story.knows(interrupted="").says(0, Stage.DEAD, exit_code=1)
    assert story.moves() == []
    assert story.plan == ended


def test_a_job_that_must_not_begin_ends_with_the_reason() -> None:
    story = Story()
    story.knows(refused="every checkpoint is damaged")
    assert story.moves() == ["end"]
    assert story.plan.stop == Stop(code=exit_codes.USAGE, reason="every checkpoint is damaged")


def test_the_lost_node_takes_members_nobody_has_reported() -> None:
    plan = first_plan(2, 1)
    facts = Story().knows(members={}, nodes_lost=frozenset({NodeId(1)})).facts
    assert gone(plan, facts, MemberId(1))
    assert not gone(plan, facts, MemberId(0))
    assert gone(plan, facts, MemberId(99)), "a member without a seat"


# ---- agents that come and go


A, B, C = Boot("a"), Boot("b"), Boot("c")


def on_two_nodes() -> Story:
    """Members 0 and 1 on node 0, 2 and 3 on node 1, at step 5; agents A and B started them."""
    story = Story(2, 2).knows(boots={NodeId(0): A, NodeId(1): B})
    story.all_say(Stage.READY)
    assert story.moves() == ["assign", "form"]
    story.all_say(Stage.ACTIVE, generation=Generation(1), step=Step(5), stepping=True)
    assert story.moves() == []
    return story


def test_an_agent_starts_what_was_assigned_to_it_once_it_is_heard_of() -> None:
    story = Story(2, 1)
    assert story.moves() == []
    assert [s.boot for s in story.plan.seats] == [None, None]
    story.knows(boots={NodeId(1): B})
    assert story.moves() == ["assign"]
    story.knows(boots={NodeId(0): A, NodeId(1): B})
    assert story.moves() == ["assign"]
    assert [s.boot for s in story.plan.seats] == [A, B]
    assert [s.member for s in story.plan.seats] == [0, 1], "nobody was lost"


def test_members_that_only_a_lost_agent_and_a_lost_coordinator_knew_are_not_started_again() -> None:
    """The new coordinator hears of node 0 from an agent that knows nothing."""
    story = on_two_nodes()
    story.plan = adopt([story.plan], term=Term(2))
    story.knows(
        members={m: f for m, f in story.facts.members.items() if f.node == 1},
        boots={NodeId(0): C, NodeId(1): B},
    )
    assert story.moves() == ["respawn", "respawn"]
    new = [s for s in story.plan.seats if s.node == 0]
    assert [s.boot for s in new] == [C, C]
    assert not {s.member for s in new} & {0, 1, 2, 3}
    assert all(gone(story.plan, story.facts, MemberId(m)) for m in (0, 1))
    for member in (2, 3):
        story.says(member, Stage.HALTED, generation=story.plan.halted)
    assert story.moves() == ["resume"]
    assert (story.world, story.plan.step) == ([2, 3], 5)


def test_a_coordinator_that_lives_on_takes_a_new_agent_for_the_end_of_the_old_ones_members() -> (
    None
):
    story = on_two_nodes().knows(boots={NodeId(0): C, NodeId(1): B})
    assert story.moves() == ["respawn", "respawn"]
    assert [s.member for s in story.plan.seats] == [4, 5, 2, 3]


def test_a_member_that_had_finished_does_not_run_again_with_a_new_agent() -> None:
    story = on_two_nodes()
    story.says(0, Stage.FINISHED, exit_code=0).knows(boots={NodeId(0): C, NodeId(1): B})
    assert story.moves() == ["respawn"]
    assert [s.member for s in story.plan.seats] == [0, 4, 2, 3]
    assert [s.boot for s in story.plan.seats] == [A, C, B, B]


def spare() -> Story:
    """Three ranks train, a fourth stands by, connected to them."""
    story = Story(seats=4).knows(world_max=3, per_node=4)
    story.all_say(Stage.READY)
    assert story.moves() == ["form"]
    for member in (0, 1, 2):
        story.says(member, Stage.ACTIVE, generation=Generation(1), step=Step(5), stepping=True)
    return story.says(3, Stage.LINKED, linked=Generation(1), stepping=True)


def test_who_is_one_too_many_stands_by() -> None:
    story = spare()
    assert story.world == [0, 1, 2]
    assert story.moves() == [], "linked, and not let in"


def test_a_spare_is_let_in_as_soon_as_there_is_room() -> None:
    story = spare()
    story.says(1, Stage.DEAD, exit_code=-9)
    story.says(0, Stage.HALTED).says(2, Stage.HALTED)
    assert story.moves() == ["respawn"], "the spare may still act on the older plan"
    story.says(3, Stage.LINKED, generation=Generation(1))
    assert story.moves() == ["resume"]
    assert story.world == [0, 2]
    assert story.plan.joining is not None, "connected to more, it needs not connect again"
    assert sorted(m.member for m in story.plan.joining.members) == [0, 2, 3]
    for member in (0, 2):
        story.says(member, Stage.ACTIVE, generation=Generation(2))
    assert story.moves() == []
    for member in (0, 2, 3):
        story.says(member, Stage.ACTIVE, generation=Generation(3), step=Step(6))
    assert story.moves() == ["grown"]
    assert sorted(story.world) == [0, 2, 3]
    # The process that was started in the lost one's seat is the next to stand by.
    story.says(4, Stage.READY, seat=1, generation=Generation(3), stepping=True)
    story.says(4, Stage.LINKED, linked=Generation(3))
    assert story.moves() == []


def test_a_spare_on_a_node_that_is_about_to_go_is_not_let_in() -> None:
    story = Story(nodes=2, seats=2).knows(world_max=3, per_node=2)
    story.all_say(Stage.READY)
    assert story.moves() == ["form"]
    for member in (0, 1, 2):
        story.says(member, Stage.ACTIVE, generation=Generation(1), step=Step(5), stepping=True)
    story.says(3, Stage.LINKED, linked=Generation(1), stepping=True)
    story.says(1, Stage.DEAD, exit_code=-9).knows(draining=frozenset({NodeId(1)}))
    story.says(0, Stage.HALTED).says(2, Stage.HALTED)
    story.says(3, Stage.LINKED, generation=Generation(1))
    assert story.moves() == ["respawn", "resume", "drain"]
    assert story.plan.joining is not None
    assert [m.member for m in story.plan.joining.members] == [0]


def test_a_spare_that_dies_breaks_nothing() -> None:
    story = spare()
    story.says(3, Stage.DEAD, exit_code=-9)
    assert story.moves() == ["respawn"]
    assert story.plan.mode is Mode.RUNNING


def test_spares_of_two_nodes_leave_the_first_world_even() -> None:
    story = Story(nodes=2, seats=3).knows(world_max=4, per_node=3)
    story.all_say(Stage.READY)
    assert story.moves() == ["form"]
    assert story.world == [0, 1, 3, 4]


def test_a_spare_that_is_lost_with_a_rank_is_not_waited_for() -> None:
    story = spare()
    story.says(1, Stage.DEAD, exit_code=-9).says(3, Stage.DEAD, exit_code=-9)
    story.says(0, Stage.HALTED).says(2, Stage.HALTED)
    assert story.moves() == ["respawn", "respawn", "resume"]
    assert story.plan.joining is None


def test_a_spare_that_dies_before_it_is_let_in_is_given_up() -> None:
    story = spare()
    story.says(1, Stage.DEAD, exit_code=-9)
    story.says(0, Stage.HALTED).says(2, Stage.HALTED)
    story.says(3, Stage.LINKED, generation=Generation(1)).moves()
    for member in (0, 2):
        story.says(member, Stage.ACTIVE, generation=Generation(2))
    story.says(3, Stage.DEAD, exit_code=-9)
    assert story.moves() == ["respawn", "withdraw"]
    assert story.plan.joining is None


def notice(*, nodes: int = 3) -> Story:
    """One rank on each node; node 1 is about to be taken away."""
    story = training(5, nodes=nodes, seats=1)
    return story.knows(draining=frozenset({NodeId(1)}))


def test_the_ranks_of_a_node_that_goes_leave_by_a_vote() -> None:
    story = notice()
    assert story.moves() == ["drain"]
    assert story.plan.mode is Mode.RUNNING
    assert story.plan.joining is not None
    assert [m.member for m in story.plan.joining.members] == [0, 2]
    for member in (0, 2):
        story.says(member, Stage.ACTIVE, generation=Generation(2), step=Step(6))
    assert story.moves() == ["drained"]
    assert story.world == [0, 2]
    story.says(1, Stage.DEAD, exit_code=exit_codes.STOPPED)
    assert story.moves() == [], "nothing is started where it would be taken away"


def test_its_seat_is_filled_once_another_agent_has_come() -> None:
    story = notice()
    story.moves()
    for member in (0, 2):
        story.says(member, Stage.ACTIVE, generation=Generation(2), step=Step(6))
    story.moves()
    story.says(1, Stage.DEAD, exit_code=exit_codes.STOPPED)
    assert story.moves() == []
    story.knows(draining=frozenset())
    assert story.moves() == ["respawn"]
    assert story.plan.seats[1].member == 3


def test_its_seat_moves_to_a_node_that_stays() -> None:
    story = notice().knows(
        per_node=1,
        boots={NodeId(n): Boot(f"b{n}") for n in range(4)},
        advised={NodeId(1): "it is about to be taken away"},
    )
    story.moves()
    for member in (0, 2):
        story.says(member, Stage.ACTIVE, generation=Generation(2), step=Step(6))
    story.moves()
    story.says(1, Stage.DEAD, exit_code=exit_codes.STOPPED)
    assert story.moves() == ["respawn"]
    assert story.plan.seats[1].node == 3


def test_a_job_whose_every_node_goes_stays_to_the_end() -> None:
    story = training(5, nodes=2, seats=1)
    story.knows(draining=frozenset({NodeId(0), NodeId(1)}))
    assert story.moves() == []
    assert story.world == [0, 1]


def test_a_rank_lost_while_others_are_to_leave() -> None:
    """The world is repaired with whoever is there, and then left."""
    story = notice()
    story.moves()
    story.says(0, Stage.DEAD, exit_code=-9)
    story.says(1, Stage.HALTED, generation=Generation(2))
    story.says(2, Stage.HALTED, generation=Generation(2))
    assert story.moves() == ["respawn", "resume", "drain"]
    assert story.world == [1, 2]
    assert story.plan.joining is not None
    assert [m.member for m in story.plan.joining.members] == [2]


def test_drills_are_nobody_s_failures() -> None:
    for drilled in (True, False):
        story = training(step=5)
        story.budget = BudgetConfig(restarts_max=0, same_place_max=1)
        story.says(1, Stage.DEAD, exit_code=-9, at_step=Step(6), drilled=drilled)
        moves = story.moves()
        if drilled:
            assert "respawn" in moves
            assert (story.plan.restarts, story.plan.seats[1].failures) == (0, 0)
        else:
            assert "end" in moves
