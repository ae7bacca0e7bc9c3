"""When a round counts: stories of leaders and nodes that die, then every state chance reaches."""

import json
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftkit.checkpoint.parity.protocol import (
    Ask,
    Event,
    Failed,
    Keep,
    Made,
    Make,
    Standing,
    awaited,
    choose,
    obey,
    standing,
    usable,
)
from ftkit.checkpoint.parity.rounds import Ballot, Holding, PartRef, RoundId, StripeSet
from ftkit.checkpoint.stripes import Code
from ftkit.core.errors import ProtocolError
from ftkit.core.ids import Generation, NodeId, Seat, Step
from ftkit.core.inventory import Copy, Part

A, B, C = (NodeId(n) for n in range(3))
ALL = ((A, B, C),)


def name(step: int, number: int = 1, leader: NodeId = A, generation: int = 1) -> RoundId:
    return RoundId(Generation(generation), Step(step), Ballot(number, leader))


def held(step: int, number: int = 1, groups=ALL, m: int = 1) -> Holding:
    return Holding(round=name(step, number), groups=groups, m=m)


class Node:
    def __init__(self) -> None:
        self.state = Standing()

    def tell(self, event: Event) -> str:
        self.state, refused = obey(self.state, event)
        return refused

    def all_of(self, round_: RoundId, keep: RoundId | None = None) -> None:
        for event in (
            Ask(round_.ballot),
            Make(round_.ballot, round_, keep),
            Made(round_),
            Keep(round_.ballot, round_),
        ):
            assert not self.tell(event)


def test_what_counts_is_kept_until_something_newer_is_whole():
    node, one, two = Node(), name(1, 1), name(2, 2)
    node.all_of(one)
    assert node.state.pinned == node.state.whole == {one}
    assert not node.tell(Ask(two.ballot))
    assert not node.tell(Make(two.ballot, two, one))
    assert node.state.pinned == {one, two}
    assert node.state.whole == {one}
    assert "is not here" in node.tell(Keep(two.ballot, two)), "half made"
    assert not node.tell(Made(two))
    assert node.state.whole == {one, two}
    assert not node.tell(Keep(two.ballot, two))
    assert node.state.pinned == {two}


def test_a_round_that_breaks_off_costs_nothing():
    node, one, two = Node(), name(1, 1), name(2, 2)
    node.all_of(one)
    node.tell(Ask(two.ballot))
    node.tell(Make(two.ballot, two, one))
    assert not node.tell(Failed(two))
    assert node.state.pinned == {one}
    assert "another round" in node.tell(Made(two))


def test_an_older_leader_is_not_obeyed():
    node, new, old = Node(), Ballot(2, B), Ballot(1, A)
    assert not node.tell(Ask(new))
    assert "node 1 leads" in node.tell(Ask(old))
    assert "was promised" in node.tell(Make(old, name(1), None))
    assert "was promised" in node.tell(Keep(old, name(1)))
    assert node.tell(Ask(new)), "a ballot is never used twice"
    assert node.state == Standing(new)


def test_a_round_all_have_made_counts_even_if_its_leader_died():
    node, one, two = Node(), name(1, 1), name(2, 2)
    node.all_of(one)
    node.tell(Ask(two.ballot))
    node.tell(Make(two.ballot, two, one))
    node.tell(Made(two))
    three = name(3, 3, B)
    node.tell(Ask(three.ballot))
    assert not node.tell(Make(three.ballot, three, two))
    assert node.state.pinned == {two, three}


def test_what_stands_is_safe_and_as_new_as_may_be():
    one, two = held(1, 1), held(2, 2)
    assert standing({}) is None
    assert standing({A: [one], B: [one], C: [one]}) == one
    assert standing({A: [one, two], B: [one, two], C: [one]}) == one, "two is half made"
    assert standing({A: [two], B: [one, two], C: [one, two]}) == two, "A was told to keep it"
    assert standing({A: [one, two], C: [one]}) == one
    assert standing({A: [one, two], C: [one, two]}) == two, "B may have been told to keep it"
    assert standing({A: [one], B: [two], C: [one, two]}) == one, "B is back and may go again"
    assert standing({A: [one]}) is None, "more than m are lost"


def test_each_group_may_lose_m():
    groups = ((A, B, C), (NodeId(3), NodeId(4), NodeId(5)))
    holding = held(1, groups=groups)
    assert usable(holding, [A, B, NodeId(3), NodeId(5)])
    assert not usable(holding, [A, B, C, NodeId(3)])


def copy(node: int, step: int, first: int, end: int, generation: int = 1) -> tuple[Copy, PartRef]:
    part = Part(layout="l", first=first, end=end, total=90)
    found = Copy(
        seat=Seat(node),
        node=NodeId(node),
        path=f"/{node}.arena",
        step=Step(step),
        generation=Generation(generation),
        part=part,
    )
    ref = PartRef(
        arena=f"{node}.arena",
        seat=Seat(node),
        step=Step(step),
        generation=Generation(generation),
        bytes=end - first,
        chunk_bytes=10,
    )
    return found, ref


def thirds(*steps: int) -> dict[NodeId, list[tuple[Copy, PartRef]]]:
    return {NodeId(n): [copy(n, s, 30 * n, 30 * n + 30) for s in steps] for n in range(3)}


def test_the_newest_complete_step_is_chosen_once():
    copies = thirds(4, 5)
    copies[C].pop()  # C has not sealed step 5
    (found,) = choose(copies, None, Code(2, 1), Ballot(7, A))
    assert found.round == RoundId(Generation(1), Step(4), Ballot(7, A))
    assert {n: [p.step for p in parts] for n, parts in found.parts.items()} == {
        A: [4],
        B: [4],
        C: [4],
    }
    assert choose(copies, held(4), Code(2, 1), Ballot(8, A)) == []
    assert choose({A: [], B: [], C: []}, None, Code(2, 1), Ballot(8, A)) == []


def test_a_step_of_two_generations_is_protected_whole():
    copies = thirds(4)
    copies[A].append(copy(0, 4, 0, 45, generation=2))
    copies[B].append(copy(1, 4, 45, 90, generation=2))
    (found,) = choose(copies, None, Code(2, 1), Ballot(1, A))
    assert found.round.version == (2, 4)
    assert [len(parts) for parts in found.parts.values()] == [1, 1, 0]


def test_all_groups_protect_the_same_step():
    copies = {NodeId(n): [copy(n, 4, 15 * n, 15 * n + 15)] for n in range(6)}
    sets = choose(copies, None, Code(2, 1), Ballot(1, A))
    assert [sorted(s.parts) for s in sets] == [[0, 2, 4], [1, 3, 5]]
    assert {s.round for s in sets} == {sets[0].round}
    assert all(StripeSet.from_json(json.loads(json.dumps(s.to_json()))) == s for s in sets)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("round",), [1, 2]),
        (("code",), [2]),
        (("code",), [9, 1]),
        (("code",), [1, 0]),
        (("groups",), [[0, 1]]),
        (("parts",), {"0": []}),
        (("parts", "0"), [["a", 0, 1, 1, -1, 1]]),
        (("parts", "0"), [["a", 0, 1, 1, 1, 0]]),
        (("parts", "x"), []),
    ],
)
def test_nonsense_is_no_set(path, value):
    (found,) = choose(thirds(4), None, Code(2, 1), Ballot(1, A))
    whole = json.loads(json.dumps(found.to_json()))
    inside = whole
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = value
    with pytest.raises(ProtocolError):
        StripeSet.from_json(whole)


def test_a_rebuild_is_awaited_only_where_it_gives_something_newer():
    copies = [c for found in thirds(4).values() for c, _ in found]
    holders = {A: [held(5)], C: [held(5)]}
    found = awaited(copies, holders, ())
    assert found is not None
    assert found.round.step == 5
    assert awaited(copies, {A: [held(4)], C: [held(4)]}, ()) is None, "the arenas have it"
    assert awaited(copies, holders, [name(5)]) is None
    both = {A: [held(5), held(6, 2)], C: [held(5), held(6, 2)]}
    assert awaited(copies, both, ()) == held(6, 2), "the newest that can be had"
    assert awaited(copies, both, [name(6, 2)]) == held(5)
    assert awaited(copies, {A: [held(5)]}, ()) is None
    assert awaited([], {}, ()) is None


@dataclass
class Talk:
    """A leader in the middle of a round: what it has yet to say to whom."""

    ballot: Ballot
    todo: list[NodeId]
    phase: str = "ask"
    order: RoundId | None = None
    keep: RoundId | None = None
    with_all: bool = True
    """Nobody who made it was lost since."""


@dataclass
class Job:
    """Three nodes, two of which may think that they lead. Whatever is said may be the last."""

    nodes: dict[NodeId, Node] = field(default_factory=lambda: {n: Node() for n in (A, B, C)})
    talks: dict[NodeId, Talk] = field(default_factory=dict)
    number: int = 0
    step: int = 0
    lost: NodeId | None = None
    published: RoundId | None = None
    #: One that was lost, until a round was made with it again.
    weak: NodeId | None = None

    def holdings(self) -> dict[NodeId, list[Holding]]:
        return {
            n: [Holding(round=r, groups=ALL, m=1) for r in node.state.whole]
            for n, node in self.nodes.items()
            if n != self.lost
        }

    def say(self, leader: NodeId, order: list[NodeId], *, works: bool = True) -> None:
        """The leader's next message; a round that breaks off is begun anew, a done one too."""
        talk = self.talks.get(leader)
        if talk is None:
            self.number += 1
            talk = self.talks[leader] = Talk(Ballot(self.number, leader), list(order))
        node = talk.todo.pop()
        if node == self.lost or not self._deliver(talk, node, works):
            del self.talks[leader]
            return
        if talk.todo:
            return
        talk.todo = list(order)
        if talk.phase == "ask":
            now = standing(self.holdings())
            self.step += 1
            talk.keep = now.round if now else None
            talk.order = RoundId(Generation(1), Step(self.step), talk.ballot)
            talk.phase = "make"
        elif talk.phase == "make":
            assert talk.order is not None
            self.published = max(talk.order, self.published or talk.order)
            self.weak = None if talk.with_all else self.weak
            talk.phase = "keep"
        else:
            del self.talks[leader]

    def _deliver(self, talk: Talk, node: NodeId, works: bool) -> bool:
        tell = self.nodes[node].tell
        if talk.phase == "ask":
            return not tell(Ask(talk.ballot))
        assert talk.order is not None
        if talk.phase == "keep":
            tell(Keep(talk.ballot, talk.order))
            return True
        if tell(Make(talk.ballot, talk.order, talk.keep)):
            return False
        return not tell(Made(talk.order) if works else Failed(talk.order)) and works

    def lose(self, node: NodeId) -> None:
        """One node, and the next only once a round was made with all of them again."""
        if self.weak is None and self.published is not None:
            self.lost = self.weak = node
            self.nodes[node] = Node()
            for talk in self.talks.values():
                talk.with_all = talk.phase == "ask" and node in talk.todo

    def check(self, floor: int) -> int:
        """Whether the invariants hold; the step below which nothing counts any more."""
        for known in self.nodes.values():
            assert len(known.state.pinned) <= 2, "P3"
            assert known.state.whole <= known.state.pinned, "P4"
        if self.published is None:
            return floor
        for gone in (A, B, C) if self.weak is None else (self.weak,):
            found = standing({n: h for n, h in self.holdings().items() if n != gone})
            assert found is not None, "P1"
            assert found.round.step >= floor, "P2"
        told = [n.state.kept.step for n in self.nodes.values() if n.state.kept]
        return max([floor, *told])


orders = st.permutations([A, B, C])
moves = st.lists(
    st.one_of(
        st.tuples(st.just("say"), st.sampled_from([A, A, A, B]), orders, st.integers(1, 4)),
        st.tuples(st.just("rush"), st.sampled_from([A, B]), orders, st.integers(2, 12)),
        st.tuples(st.sampled_from(["fail", "die"]), st.sampled_from([A, B]), orders, st.just(1)),
        st.tuples(st.sampled_from(["lose", "back"]), st.sampled_from([A, B, C]), orders, st.just(1)),
    ),
    max_size=40,
)  # fmt: skip


@settings(max_examples=200)
@given(moves)
def test_once_published_something_can_always_be_rebuilt(happened):
    job, floor = Job(), 0
    for what, node, order, count in happened:
        match what:
            case "say" | "rush":
                for _ in range(count):
                    job.say(node, order)
                    floor = job.check(floor)
            case "fail":
                job.say(node, order, works=False)
            case "die":
                job.talks.pop(node, None)
            case "lose":
                job.lose(node)
            case "back":
                job.lost = None
        floor = job.check(floor)
    # Safe, and alive: with nobody lost and one leader, the next round goes through.
    job.lost = None
    job.talks.clear()
    for _ in range(9):
        job.say(A, [A, B, C])
        floor = job.check(floor)
    assert {n.state.kept for n in job.nodes.values()} == {job.published}
    assert job.published is not None
    assert job.published.step == job.step
