"""Where a seat's next process starts: where it was, unless that is advised against."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from ftkit.core.ids import Boot, NodeId
from ftkit.recovery.budget import BudgetConfig
from ftkit.recovery.facts import JobFacts, Stage
from ftkit.recovery.placement import place
from ftkit.recovery.plan import Plan, first_plan
from tests.recovery.stories import Story, training

WHY = "it failed five times"
BAD = {NodeId(1): WHY}


def facts(agents: int, **more: object) -> JobFacts:
    boots = {NodeId(n): Boot(f"b{n}") for n in range(agents)}
    return JobFacts(members={}, boots=boots, per_node=2, **more)  # type: ignore[arg-type]


def placed(plan: Plan, seat: int, known: JobFacts) -> tuple[int, str]:
    return place(plan, plan.seats[seat], known)


def test_without_advice_it_stays_whatever_is_free() -> None:
    assert placed(first_plan(2, 2), 3, facts(4)) == (1, "")


def test_advised_against_it_goes_to_a_node_whose_place_is_free() -> None:
    # Node 0 has a rank in each of its places; node 2 has none.
    assert placed(first_plan(2, 2), 3, facts(3, advised=BAD)) == (2, WHY)


def test_a_bad_node_is_better_than_none() -> None:
    plan = first_plan(2, 2)
    assert placed(plan, 3, facts(2, advised=BAD)) == (1, "")
    assert placed(plan, 3, facts(3, advised=BAD | {NodeId(2): "so did this"})) == (1, "")
    assert placed(plan, 3, facts(3, advised=BAD, nodes_lost=frozenset({NodeId(2)}))) == (1, "")


def test_who_knows_no_places_moves_nobody() -> None:
    known = JobFacts(members={}, boots={NodeId(2): Boot("b")}, advised=BAD)
    assert placed(first_plan(2, 2), 3, known) == (1, "")


def assigned(agents: int, advised: dict[NodeId, str]) -> Story:
    story = Story(nodes=2, seats=2)
    boots = {NodeId(n): Boot(f"b{n}") for n in range(agents)}
    story.knows(members={}, boots=boots, advised=advised, per_node=2)
    assert story.moves() == ["assign"]
    return story


def test_a_job_begins_on_the_spare_node_and_its_ranks_stay_together() -> None:
    story = assigned(4, BAD)
    assert [(s.node, s.boot) for s in story.plan.seats] == [
        *((0, "b0"), (0, "b0")),
        *((2, "b2"), (2, "b2")),
    ]


def test_of_two_bad_nodes_the_second_gets_the_other_spare() -> None:
    story = assigned(4, BAD | {NodeId(0): WHY})
    assert [s.node for s in story.plan.seats] == [2, 2, 3, 3]


def test_a_rank_that_dies_on_a_bad_node_starts_elsewhere_and_the_others_stay() -> None:
    story = training(5, nodes=2, seats=2)
    boots = {NodeId(n): Boot(f"b{n}") for n in range(3)}
    story.knows(boots=boots, per_node=2)
    assert story.moves() == ["assign"]
    story.knows(advised=BAD).says(3, Stage.DEAD, exit_code=-9)
    before = story.plan
    assert story.moves() == ["respawn"]
    assert [s.node for s in story.plan.seats] == [0, 0, 1, 2]
    moved = story.plan.seats[3]
    assert (moved.member, moved.boot) == (4, "b2")
    # Its neighbour follows to the same node when it dies, too, and nobody starts twice.
    story.says(2, Stage.DEAD, exit_code=-9)
    assert story.moves() == ["respawn"]
    assert [s.node for s in story.plan.seats] == [0, 0, 2, 2]
    assert before.seats[0] == story.plan.seats[0]


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.sets(st.integers(0, 4)), st.sets(st.integers(0, 4))),
        max_size=12,
    )
)
def test_whoever_dies_under_whatever_advice_no_place_is_taken_twice(
    losses: list[tuple[int, set[int], set[int]]],
) -> None:
    story = training(5, nodes=2, seats=2)
    story.budget = BudgetConfig(same_place_max=100)
    boots = {NodeId(n): Boot(f"b{n}") for n in range(5)}
    story.knows(boots=boots, per_node=2).moves()
    for seat, advised, lost in losses:
        before = story.plan.seats[seat]
        nodes_lost = frozenset(NodeId(n) for n in lost - {before.node})
        story.knows(advised={NodeId(n): WHY for n in advised}, nodes_lost=nodes_lost)
        story.says(before.member, Stage.DEAD, seat=seat, exit_code=-9).moves()
        after = story.plan.seats[seat]
        places = Counter((s.node, s.seat % 2) for s in story.plan.seats)
        assert max(places.values()) == 1
        if after.node != before.node:
            assert before.node in advised or after.failures > 2, "it failed there twice"
            assert after.node not in advised | lost
        assert after.boot == boots[after.node]
