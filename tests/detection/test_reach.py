"""Nodes that are silent: others are asked, and what they say puts off the end by so much, no more."""

import pytest

from ftkit.core.errors import ProtocolError
from ftkit.core.ids import NodeId
from ftkit.detection.reach import Reach, ReachOrder
from ftkit.detection.signals import ReachSeen, from_json, to_json

NODE_S = 8.0
TICK_S = 0.25
NODES = [NodeId(n) for n in range(6)]


class Silence:
    """Nodes that fall silent at 0 on a fake clock, and what others say of them."""

    def __init__(self, *silent: int, reached_by: tuple[int, ...] = ()) -> None:
        self.reach = Reach(NODE_S)
        self.silent = [NodeId(n) for n in silent]
        self.reached_by = reached_by
        self.orders: list[tuple[float, ReachOrder]] = []
        self.now = 0.0

    def run(self, until: float, *, answers: bool = True) -> dict[int, float]:
        """When each was taken for lost."""
        lost: dict[int, float] = {}
        others = [n for n in NODES if n not in self.silent]
        while self.now < until:
            self.now += TICK_S
            unheard = dict.fromkeys(others, 0.1) | dict.fromkeys(self.silent, self.now)
            for order in self.reach.orders(unheard, others, self.now):
                self.orders.append((self.now, order))
                if answers:
                    self.reach.take(self.answer(order))
            for node in self.reach.lost(unheard, self.now):
                lost.setdefault(node, self.now)
        return lost

    def answer(self, order: ReachOrder) -> ReachSeen:
        reached = order.via in self.reached_by
        return ReachSeen(
            order=order.number,
            node=order.node,
            via=order.via,
            at=self.now,
            reached=reached,
            error="" if reached else "timed out",
        )


@pytest.mark.parametrize("answers", [True, False])
def test_a_node_that_nobody_reaches_is_lost_as_soon_as_ever(answers: bool) -> None:
    silence = Silence(2)
    assert silence.run(20.0, answers=answers) == {2: NODE_S + TICK_S}
    first = silence.orders[0][0]
    assert first == NODE_S / 2 + TICK_S
    assert first + silence.orders[0][1].limit_s < NODE_S, "the answer comes in time"


def test_two_others_are_asked_and_again_and_again() -> None:
    silence = Silence(2, 5)
    silence.run(NODE_S)
    asked = [(at, o.node, o.via) for at, o in silence.orders]
    assert asked[:4] == [(4.25, 2, 3), (4.25, 2, 4), (4.25, 5, 0), (4.25, 5, 1)]
    assert sorted({at for at, _, _ in asked}) == [4.25, 6.25]
    assert len({o.number for _, o in silence.orders}) == len(silence.orders)


def test_one_that_others_reach_has_half_as_long_again_and_no_more() -> None:
    assert Silence(2, reached_by=(4,)).run(40.0) == {2: 1.5 * NODE_S + TICK_S}


def test_what_was_so_some_time_ago_counts_no_longer() -> None:
    silence = Silence(2, reached_by=(3,))
    silence.run(5.0)
    silence.reached_by = ()
    (at,) = silence.run(40.0).values()
    assert NODE_S < at <= 4.25 + NODE_S / 2 + TICK_S


def test_alone_there_is_nobody_to_ask() -> None:
    reach = Reach(NODE_S)
    assert reach.orders({NodeId(0): 7.0}, [], 7.0) == []
    assert reach.lost({NodeId(0): 7.0}, 7.0) == frozenset()
    assert reach.lost({NodeId(0): 8.5}, 8.5) == {0}


def test_who_was_not_asked_is_not_heard() -> None:
    silence = Silence(2)
    silence.run(NODE_S, answers=False)
    _, order = silence.orders[0]
    silence.reached_by = (order.via,)
    said = silence.answer(order)
    for other in ({"order": 99}, {"node": 1}):
        silence.reach.take(from_json(to_json(said) | other))  # type: ignore[arg-type]
    assert silence.run(NODE_S + 1, answers=False) == {2: NODE_S + TICK_S}


def test_two_refusals_prove_that_an_agent_is_dead() -> None:
    reach, others = Reach(NODE_S), NODES[:5]
    unheard = {NodeId(5): 0.1}
    reach.refused(NodeId(5))
    assert not reach.lost(unheard, 0.1), "one is an answer of whoever answers"
    orders = reach.orders(unheard, others, 0.1)
    assert [o.via for o in orders] == [0, 1], "so others are asked at once"
    reach.take(refusal(orders[0]))
    assert reach.lost(unheard, 0.1) == {5}
    assert reach.is_proved(NodeId(5), 0.1)
    reach.connected(NodeId(5))
    assert not reach.lost({NodeId(5): 0.0}, 0.2), "another agent is there"
    reach.take(refusal(orders[1]))
    assert not reach.lost({NodeId(5): 0.0}, 0.2), "what came late was said of the last one"


def test_nobody_is_dead_whom_others_reach() -> None:
    reach, unheard = Reach(NODE_S), {NodeId(5): 1.0}
    reach.refused(NodeId(5))
    order, _ = reach.orders(unheard, NODES[:5], 1.0)
    seen = ReachSeen(order=order.number, node=NodeId(5), via=order.via, at=1.0, reached=True)
    reach.take(seen)
    reach.refused(NodeId(5))
    assert not reach.lost(unheard, 1.5), "a firewall refuses the coordinator alone"
    assert reach.lost({NodeId(5): 1.5 * NODE_S + 1}, 1.5 * NODE_S + 1) == {5}, "not for ever"


def refusal(order: ReachOrder) -> ReachSeen:
    return ReachSeen(
        order=order.number, node=order.node, via=order.via, at=0.1, reached=False, refused=True
    )


@pytest.mark.parametrize(
    "wrong",
    [{"reached": "yes"}, {"reached": None}, {"refused": "no"}, {"node": "x"}, {"at": []}],
)
def test_what_is_no_answer_is_refused_where_it_comes_in(wrong: dict[str, object]) -> None:
    said = ReachSeen(order=1, node=NodeId(2), via=NodeId(3), at=1.0, reached=True)
    assert from_json(to_json(said)) == said
    with pytest.raises(ProtocolError):
        from_json(to_json(said) | wrong)
