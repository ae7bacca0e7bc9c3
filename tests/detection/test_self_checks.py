"""A suspect's node is checked beside one that nobody suspects, seldom, and the verdict has the result."""

from dataclasses import replace

import pytest

from ftkit.core.ids import MemberId, NodeId, Seat
from ftkit.core.verdict import Fault, Verdict
from ftkit.detection.node_health import Check, Health, NodeResult
from ftkit.detection.observations import WorldChanged
from ftkit.detection.self_checks import AGAIN_S, CHECKS_MAX, GIVEN_UP_S, SelfChecks
from ftkit.detection.signals import NodeChecked, from_json, to_json
from tests.detection.scene import world

RIGHT = "3c8c"


def verdict(seat: int, fault: Fault = Fault.SLOW, *, suspected: bool = False) -> Verdict:
    return Verdict(
        fault=fault,
        member=MemberId(100 + seat),
        seat=Seat(seat),
        reason="it is slow",
        since_s=0.0,
        suspected=suspected,
        confidence=0.5,
    )


def result(node: int, *, speed: float = 100.0, right: bool = True) -> NodeChecked:
    check = Check(
        name="gemm",
        health=Health.OK if right else Health.FAILED,
        value=speed,
        unit="GFLOP/s",
        digest=RIGHT if right else "0bad",
        note=f"{speed:g} GFLOP/s a core" if right else "the product is wrong",
    )
    found = NodeResult(node=f"host{node}", at=0.0, checks=(check,))
    return NodeChecked(node=NodeId(node), at=0.0, result=found.to_json())


def checks(nodes: int = 3) -> SelfChecks:
    made = SelfChecks()
    made.ingest(WorldChanged(world=world(nodes, per_node=1), at=0.0))
    return made


def test_the_suspect_and_one_beside_it_are_asked_once_and_nobody_waits() -> None:
    made = checks()
    assert made.tick(0.0, [verdict(0)]) == [verdict(0)]
    assert made.orders() == [0, 1]
    made.tick(1.0, [verdict(0)])
    assert (made.orders(), made.ended()) == ([], [])


def test_whether_suspected_arithmetic_errs_is_looked_into() -> None:
    made = checks()
    made.tick(0.0, [verdict(1, Fault.SDC, suspected=True)])
    assert 1 in made.orders()


@pytest.mark.parametrize("fault", [Fault.EXITED, Fault.STARVED, Fault.SLOW_COMM, Fault.NUMERIC])
def test_what_a_node_cannot_be_blamed_for_asks_nobody(fault: Fault) -> None:
    made = checks()
    made.tick(0.0, [verdict(0, fault), verdict(1, Fault.SLOW, suspected=True)])
    assert made.orders() == []


def test_a_healthy_node_is_said_to_be_and_one_that_computes_wrongly_too() -> None:
    for mine, healthy, words in (
        (result(2), True, "node 2 computes and remembers as it should (gemm 100 GFLOP/s"),
        (result(2, right=False), False, "gemm the product is wrong"),
        (result(2, speed=30), False, "70 % worse"),
    ):
        made = checks()
        made.tick(0.0, [verdict(2)])
        assert made.orders() == [2, 0]
        made.ingest(mine)
        made.ingest(result(0))
        (said,) = made.tick(5.0, [verdict(2)])
        (ended,) = made.ended()
        assert (ended.node, ended.healthy, ended.beside) == (2, healthy, 0)
        assert words in ended.said
        assert said.evidence["self_check"] == ended.to_json()
        assert said.reason.startswith("it is slow. Its node's self-check:")


def test_what_is_found_later_is_not_told_what_was_checked_before() -> None:
    made = checks()
    made.tick(0.0, [verdict(2)])
    made.ingest(result(2))
    made.ingest(result(0))
    (said,) = made.tick(5.0, [verdict(2)])
    assert "self_check" in said.evidence
    later = replace(verdict(2), since_s=300.0)
    assert made.tick(310.0, [later]) == [later]


def test_a_node_that_does_not_answer_could_not_be_checked() -> None:
    made = checks()
    made.tick(0.0, [verdict(1)])
    made.ingest(result(0))
    made.tick(GIVEN_UP_S + 1, [verdict(1)])
    (ended,) = made.ended()
    assert (ended.healthy, "did not answer" in ended.said) == (None, True)


def test_an_error_or_nonsense_is_no_result() -> None:
    for came in (
        NodeChecked(node=NodeId(0), at=0.0, error="killed"),
        NodeChecked(node=NodeId(0), at=0.0, result={"node": 3}),
    ):
        made = checks(nodes=1)
        made.tick(0.0, [verdict(0)])
        assert made.orders() == [0], "there is none to be compared with"
        made.ingest(came)
        made.tick(1.0, [])
        assert [e.healthy for e in made.ended()] == [None]


def test_it_is_done_again_only_after_a_while_and_not_for_ever() -> None:
    made, now, asked = checks(nodes=1), 0.0, 0
    for _ in range(2 * CHECKS_MAX):
        made.tick(now, [verdict(0, Fault.SDC)])
        asked += len(made.orders())
        made.ingest(result(0))
        made.tick(now + 1, [verdict(0, Fault.SDC)])
        made.tick(now + AGAIN_S - 1, [verdict(0, Fault.SDC)])
        assert made.orders() == []
        now += AGAIN_S + 2
    assert asked == CHECKS_MAX


def test_it_crosses_the_wire() -> None:
    one = result(1)
    assert to_json(from_json(to_json(one))) == to_json(one)
