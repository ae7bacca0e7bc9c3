"""When parity counts: stories of nodes that die, then every state that random events reach."""

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from ftkit.checkpoint.parity_protocol import Moved, advance, resume, waits_for
from ftkit.checkpoint.parity_state import (
    Abandon,
    Acknowledged,
    BeyondRepair,
    Command,
    Encode,
    Event,
    Formed,
    Holds,
    Lost,
    ParityState,
    Publish,
    Published,
    Rebuild,
    RebuildWanted,
    Rebuilt,
    Refused,
    Release,
    Sent,
    Version,
)
from ftkit.checkpoint.slots import SLOTS
from ftkit.core.ids import Generation, NodeId, Step

A, B, C, D = (NodeId(n) for n in range(4))
ALL = frozenset([A, B, C])


def version(step: int, generation: int = 1) -> Version:
    return Generation(generation), Step(step)


def world(generation: int = 1, nodes: frozenset[NodeId] = ALL, m: int = 1) -> Formed:
    return Formed(Generation(generation), (nodes,), m)


class Story:
    """A state and all commands so far."""

    def __init__(self, formed: Formed | None = None) -> None:
        self.state = ParityState(generation=Generation(0), groups=(), m=1)
        self.said = list[Command]()
        self.tell(formed or world())

    def tell(self, *events: Event) -> list[Command]:
        """What follows from these events."""
        found = list[Command]()
        for event in events:
            self.state, commands = advance(self.state, event)
            found += commands
        self.said += found
        return found

    def sealed(self, *versions: Version) -> list[Command]:
        nodes = sorted(self.state.nodes - self.state.gone)
        return self.tell(*(Holds(n, frozenset(versions)) for n in nodes))

    def acknowledged(self, *versions: Version) -> list[Command]:
        nodes = sorted(self.state.nodes)
        return self.tell(*(Acknowledged(n, v) for v in versions for n in nodes))

    def published(self) -> Version | None:
        return None if self.state.published is None else self.state.published.version


def with_published(step: int = 1, formed: Formed | None = None) -> Story:
    story = Story(formed)
    story.sealed(version(step))
    story.acknowledged(version(step))
    assert story.published() == version(step)
    return story


def test_sealed_sent_acknowledged_published():
    story, one = Story(), version(1)
    assert story.tell(Holds(A, frozenset([one])), Holds(B, frozenset([one]))) == []
    assert story.tell(Holds(C, frozenset([one]))) == [Encode(one)]
    assert story.tell(*(Sent(n, one) for n in (A, B))) == []
    assert waits_for(story.state) == "parity of step 1 waits for nodes [2] to send"
    assert story.tell(Sent(C, one), Acknowledged(A, one), Acknowledged(B, one)) == []
    assert waits_for(story.state) == "parity of step 1 waits for nodes [2] to acknowledge"
    assert story.published() is None, "two of three do not publish"
    assert story.tell(Acknowledged(C, one)) == [Publish(one)]
    assert waits_for(story.state) == "no parity is being made"


def test_the_older_is_released_after_the_newer_is_published_and_not_before():
    story, two = with_published(1), version(2)
    assert story.sealed(two) == [Encode(two)]
    assert story.tell(Acknowledged(A, two), Acknowledged(B, two)) == []
    assert story.state.kept == {version(1), two}
    assert story.tell(Acknowledged(C, two)) == [Publish(two), Release(version(1))]


def test_the_newest_that_all_hold_is_taken():
    story = Story()
    story.tell(
        Holds(A, frozenset([version(3), version(4)])), Holds(B, frozenset([version(4), version(5)]))
    )
    assert story.tell(Holds(C, frozenset([version(3), version(4), version(5)]))) == [
        Encode(version(4))
    ]
    assert story.sealed(version(3)) == [], "older than what has begun"


def test_nodes_may_be_a_step_apart_and_no_more_than_the_slots_allow():
    story = with_published(1)
    assert story.sealed(version(2)) == [Encode(version(2))]
    assert story.sealed(version(3)) == [Encode(version(3))]
    assert story.sealed(version(4)) == [], "three slots: published, and two on their way"
    assert len(story.state.kept) == SLOTS
    assert story.acknowledged(version(2)) == [
        Publish(version(2)),
        Release(version(1)),
        Encode(version(4)),  # begins as soon as a slot is free
    ]


def test_what_a_newer_one_overtakes_is_abandoned():
    story = with_published(1)
    story.sealed(version(2))
    story.sealed(version(3))
    found = story.acknowledged(version(3))
    assert found[0] == Publish(version(3))
    assert Abandon(version(2), "step 3 overtook it") in found
    assert Release(version(1)) in found
    assert story.acknowledged(version(2)) == []
    assert story.published() == version(3)


def test_a_node_that_dies_in_encode_leaves_the_older_stripes_complete():
    story = with_published(1)
    story.sealed(version(2))
    story.tell(Sent(A, version(2)), Acknowledged(B, version(2)))
    assert story.tell(Lost(C)) == [Abandon(version(2), "node 2 is lost")]
    assert story.published() == version(1)
    assert story.acknowledged(version(2)) == [], "late words about it change nothing"
    assert story.sealed(version(3)) == [], "nothing begins until a world is formed"
    assert story.tell(RebuildWanted()) == [Rebuild(version(1), frozenset([C]))]
    assert story.tell(RebuildWanted()) == [], "it is being done"


def test_the_old_stripes_stay_until_the_new_world_has_its_own():
    story = with_published(1)
    story.tell(Lost(C))
    assert story.tell(world(2, frozenset([A, B, D]))) == []
    assert story.sealed(version(1), version(9)) == [], "9 may be of a history that was given up"
    assert story.sealed(version(1), version(2, 2)) == [Encode(version(2, 2))]
    assert story.published() == version(1)
    assert story.acknowledged(version(2, 2)) == [Publish(version(2, 2)), Release(version(1))]
    assert story.state.published == Published(version(2, 2), (frozenset([A, B, D]),), 1)


def test_a_late_acknowledgement_of_an_older_generation_is_dropped():
    story = with_published(1)
    story.sealed(version(2))
    story.tell(Acknowledged(A, version(2)), Acknowledged(B, version(2)))
    assert story.tell(world(2)) == [Abandon(version(2), "the world of generation 2 was formed")]
    before = story.state
    assert story.tell(Acknowledged(C, version(2)), Sent(C, version(2))) == []
    assert story.tell(world(1), world(2)) == [], "nor a world that is not newer"
    assert story.state == before


def test_a_world_that_is_told_again_brings_nobody_back():
    story = with_published(1)
    story.tell(Lost(C))
    assert story.tell(world(1)) == []
    assert story.state.gone == {C}


def test_words_of_strangers_change_nothing():
    story = Story()
    story.sealed(version(1))
    before = story.state
    said = story.tell(
        Acknowledged(D, version(1)),
        Sent(D, version(1)),
        Refused(D, version(1), "no"),
        Holds(D, frozenset([version(9)])),
        Lost(D),
        Rebuilt(version(1), frozenset([D])),
    )
    assert said == []
    assert story.state == before


def test_a_node_that_cannot_take_part_costs_this_snapshot_only():
    story = with_published(1)
    story.sealed(version(2))
    story.sealed(version(2), version(3))  # begins too
    found = story.tell(Refused(B, version(2), "step 2 was overwritten"))
    assert found == [Abandon(version(2), "node 1: step 2 was overwritten")]
    assert story.acknowledged(version(3)) == [Publish(version(3)), Release(version(1))]


def test_a_refusal_frees_a_slot_for_the_next():
    story = with_published(1)
    for step in (2, 3, 4):
        story.sealed(version(step))
    found = story.tell(Refused(A, version(3), "no memory"))
    assert found == [Abandon(version(3), "node 0: no memory"), Encode(version(4))]


def test_a_node_that_dies_during_a_rebuild_is_planned_for_anew():
    story = with_published(1, world(nodes=frozenset([A, B, C, D]), m=2))
    story.tell(Lost(A))
    assert story.tell(RebuildWanted()) == [Rebuild(version(1), frozenset([A]))]
    assert story.tell(Lost(B)) == [Rebuild(version(1), frozenset([A, B]))]
    assert story.tell(Lost(B)) == []
    assert story.tell(Rebuilt(version(1), frozenset([A]))) == []
    assert story.state.rebuilding is not None, "that answered the command before"
    assert story.tell(Rebuilt(version(1), frozenset([A, B]))) == []
    assert story.state.rebuilding is None


def test_losing_more_than_m_says_that_only_disk_is_left():
    story = with_published(1)
    story.tell(Lost(A), RebuildWanted())
    (found,) = story.tell(Lost(C))
    assert isinstance(found, BeyondRepair)
    assert "step 1 makes up for 1 nodes of a group" in found.reason
    assert "[[0, 2]] are lost" in found.reason
    (again,) = story.tell(RebuildWanted())
    assert again == found
    assert isinstance(Story().tell(RebuildWanted())[0], BeyondRepair)


def test_m_nodes_of_each_group_may_be_lost():
    groups = (frozenset([A, B]), frozenset([C, D]))
    story = with_published(1, Formed(Generation(1), groups, 1))
    story.tell(Lost(A), Lost(C))
    assert story.tell(RebuildWanted()) == [Rebuild(version(1), frozenset([A, C]))]
    (found,) = story.tell(Lost(D))
    assert isinstance(found, BeyondRepair)


def test_what_a_rebuild_reads_is_kept_until_it_is_done():
    story = with_published(1)
    story.tell(Lost(C), RebuildWanted(), world(2, frozenset([A, B, D])))
    story.sealed(version(2, 2))
    assert story.acknowledged(version(2, 2)) == [Publish(version(2, 2))], "and nothing released"
    assert story.state.kept == {version(1), version(2, 2)}
    assert story.tell(Rebuilt(version(1), frozenset([C]))) == [Release(version(1))]


def test_a_rebuild_of_the_newest_ends_one_of_an_older():
    story = with_published(1)
    story.tell(Lost(C), RebuildWanted(), world(2, frozenset([A, B, D])))
    story.sealed(version(2, 2))
    story.acknowledged(version(2, 2))
    story.tell(Lost(D))
    assert story.tell(RebuildWanted()) == [
        Rebuild(version(2, 2), frozenset([D])),
        Release(version(1)),
    ]


def test_a_world_too_small_for_parity_keeps_what_there_is():
    story = with_published(1)
    story.tell(Lost(C), Formed(Generation(2), (), 1))
    assert story.tell(Holds(A, frozenset([version(2, 2)]))) == []
    assert story.tell(RebuildWanted()) == [Rebuild(version(1), frozenset([C]))]


class TestANewCoordinator:
    def whole(self, step: int, *lost: NodeId) -> Published:
        return Published(version(step), (ALL,), 1, frozenset(lost))

    def test_takes_over_what_is_complete_and_drops_what_is_half_made(self):
        state, commands = resume(world(), [self.whole(1), self.whole(2, B)])
        assert state.published == self.whole(1), "step 2 would survive no further loss"
        assert commands == (Abandon(version(2), "its coordinator died"),)
        story = Story()
        story.state = state
        assert story.acknowledged(version(2)) == [], "abandoned is not published (P5)"
        assert story.sealed(version(2)) == []
        assert story.sealed(version(3)) == [Encode(version(3))]

    def test_publishes_what_the_dead_one_had_no_time_to(self):
        state, commands = resume(world(), [self.whole(1), self.whole(2)])
        assert state.published == self.whole(2)
        assert commands == (Abandon(version(1), "its coordinator died"),)

    def test_that_died_with_a_node_can_still_rebuild_it(self):
        state, _ = resume(world(2, frozenset([A, B, D])), [self.whole(2, C), self.whole(1, C)])
        _, commands = advance(state, RebuildWanted())
        assert commands == (Rebuild(version(2), frozenset([C])),)

    def test_finds_nothing_where_too_much_is_gone(self):
        state, commands = resume(world(), [self.whole(1, A, B)])
        assert state.published is None
        assert commands == (Abandon(version(1), "its coordinator died"),)
        assert resume(world(), [])[0].published is None


nodes = st.sampled_from([A, B, C, D])
versions = st.builds(version, st.integers(1, 6), st.integers(1, 3))
events = st.one_of(
    st.builds(Holds, nodes, st.frozensets(versions, max_size=4)),
    st.builds(Sent, nodes, versions),
    st.builds(Acknowledged, nodes, versions),
    st.builds(Refused, nodes, versions, st.just("no")),
    st.builds(Lost, nodes),
    st.just(RebuildWanted()),
    st.builds(Rebuilt, versions, st.frozensets(nodes, max_size=2)),
    st.builds(world, st.integers(1, 3), st.sampled_from([ALL, frozenset([A, B, D])])),
    # Whole rounds, or random words would hardly ever add up to a publication.
    st.tuples(st.just("sealed"), versions),
    st.tuples(st.just("acknowledged"), versions),
)


class Watched(Story):
    """Checks the invariants on every state, with a memory that the protocol does not have."""

    def __init__(self) -> None:
        self.agreed = dict[Version, set[NodeId]]()
        self.dropped = set[Version]()
        self.loose = set[Version]()
        super().__init__()

    def tell(self, *events: Event) -> list[Command]:
        found = list[Command]()
        for event in events:
            before = self.state
            commands = super().tell(event)
            self.check(before, event, commands)
            found += commands
        return found

    def check(self, before: ParityState, event: Event, commands: list[Command]) -> None:
        state = self.state
        if isinstance(event, Acknowledged) and any(
            f.version == event.version for f in before.flights
        ):
            self.agreed.setdefault(event.version, set()).add(event.node)
        for index, command in enumerate(commands):
            match command:
                case Publish(v):
                    assert before.published is None or v > before.published.version  # P2
                    assert self.agreed[v] >= before.nodes  # P2
                    assert v not in self.dropped  # P5
                case Release(v):
                    assert v not in state.kept  # P1, P4
                    earlier = commands[:index]
                    assert any(isinstance(c, Publish | Rebuild) for c in earlier) or isinstance(
                        event, Rebuilt | Lost
                    )
                    self.loose.add(v)
                case Abandon(v):
                    assert v not in state.kept
                    self.dropped.add(v)
                case Encode(v):
                    assert v not in self.dropped | self.loose
                    assert all(v in state.held[n] for n in state.nodes)
                case _:
                    pass
        if before.published is not None:
            assert state.published is not None  # P1
            assert state.published.version >= before.published.version
            if state.published.version == before.published.version:
                assert state.published.lost >= before.published.lost
        assert len(state.kept) <= SLOTS  # P3
        # Whatever is kept no more was said to be so: no slot leaks.
        assert before.kept - state.kept <= self.loose | self.dropped
        assert list(state.flights) == sorted(state.flights, key=lambda f: f.version)
        if state.rebuilding is not None:  # P4
            assert state.rebuilding.version in state.kept
            assert not state.rebuilding.beyond


@settings(max_examples=300)
@given(st.lists(events, max_size=40))
def test_the_invariants_hold_whatever_happens(happened):
    story = Watched()
    for event in happened:
        match event:
            case ("sealed", found):
                story.sealed(found)
            case ("acknowledged", found):
                story.acknowledged(found)
            case _:
                story.tell(event)


def test_a_healthy_job_publishes_every_step_that_it_has_time_for():
    story = Watched()
    for step in range(1, 50):
        story.sealed(version(step))
        story.acknowledged(version(step))
        assert story.published() == version(step)
        assert story.state.kept == {version(step)}


def test_advance_changes_no_state_in_place():
    story = with_published(1)
    frozen = replace(story.state)
    moved: Moved = advance(story.state, Lost(A))
    assert moved[0] != frozen
    assert story.state == frozen
