"""Who is broken in a drill of links, and what has to be said of it."""

from typing import Any

import pytest

from ftkit.launch.checker import Answer
from ftkit.launch.drill_catalogue import BLACKHOLE, LINK_FAULTS, PARTITION, SLOW_LINK, SLOW_NIC
from ftkit.launch.drill_plan import Drill, choose
from ftkit.launch.link_drills import culprit, judge_link
from tests.launch.test_member_drills import event, outcome


def drill(fault: str, seed: int = 1) -> Drill:
    return choose(fault, None, seed=seed, nproc=3, steps=200)


def steps(begin: float, each: float, count: int) -> list[dict[str, Any]]:
    return [event(begin + i * each, "commit", member=0, step=i) for i in range(count)]


def named(mono: float, one: Drill, **other: Any) -> dict[str, Any]:
    """A verdict that names whom the drill is about, or others."""
    who = culprit(one, 3)
    assert who is not None
    fault, where, seat, peer = who.name
    fields = {"fault": fault, "seat": seat, "peer": peer, "where": where} | other
    evidence = {"where": fields.pop("where"), "probe_s": 0.5}
    return event(mono, "verdict", reason="", evidence=evidence, **fields)


FAST, SLOW = steps(0.0, 0.01, 20), steps(1.01, 0.1, 20)
STRUCK, HEALED = event(1.0, "drill"), event(4.0, "healed")


def judge(one: Drill, *events: dict[str, Any]) -> Any:
    return judge_link(outcome(one.fault), one, 3, [*FAST, STRUCK, HEALED, *events])


@pytest.mark.parametrize("fault", [SLOW_LINK, SLOW_NIC])
def test_what_is_slow_must_be_slow_and_be_named_and_costs_nobody_a_place(fault: str) -> None:
    one = drill(fault)
    good = judge(one, *SLOW, named(2.0, one))
    assert good.outcome is Answer.PASS, good.evidence
    assert (good.evidence["step_s"], good.evidence["slow_step_s"]) == (0.01, 0.1)
    assert (good.evidence["named_s"], good.evidence["suspect_steps"]) == (1.0, 5)
    assert judge(one, *steps(1.01, 0.01, 20), named(2.0, one)).outcome is Answer.UNKNOWN
    halted = event(2.0, "halt", reason="why")
    assert judge(one, *SLOW, named(2.0, one), halted).outcome is Answer.FAIL
    assert judge(one, *SLOW).outcome is Answer.FAIL, "nobody was named"


@pytest.mark.parametrize(
    "other", [{"seat": 9}, {"peer": 9}, {"where": "direction"}, {"fault": "hang-comm"}]
)
def test_nobody_else_may_be_named(other: dict[str, Any]) -> None:
    one = drill(SLOW_LINK)
    assert judge(one, *SLOW, named(2.0, one), named(2.5, one, **other)).outcome is Answer.FAIL
    assert judge(one, *SLOW, named(2.0, one, **other)).outcome is Answer.FAIL


def test_nobody_may_be_named_before() -> None:
    one = drill(SLOW_LINK)
    assert judge(one, *SLOW, named(0.5, one), named(2.0, one)).outcome is Answer.FAIL


def test_a_blackhole_is_named_and_slows_no_step() -> None:
    one = drill(BLACKHOLE)
    assert judge(one, named(2.0, one)).outcome is Answer.PASS
    assert judge(one, named(2.0, one, fault="slow-comm")).outcome is Answer.FAIL


def test_the_seed_decides_what_of_a_nic_is_slow() -> None:
    found = {}
    for seed in range(30):
        who = culprit(one := drill(SLOW_NIC, seed), 3)
        assert who is not None
        found[who.where] = who
        assert culprit(one, 3) == who
        assert who.peer is None
        assert who.seat == one.seat
    ways = {where.value: who.ways for where, who in found.items()}
    assert set(ways) == {"egress", "ingress", "nic"}
    assert all(
        a == found_.seat
        for found_ in found.values()
        if found_.where.value == "egress"
        for a, _ in found_.ways
    )
    assert [len(ways[w]) for w in ("egress", "ingress", "nic")] == [2, 2, 4]


def test_a_cut_names_nobody_and_every_fault_needs_a_third_rank() -> None:
    assert culprit(drill(PARTITION), 3) is None
    for fault in LINK_FAULTS:
        assert drill(fault).second_seat is not None
