"""Who is broken in a drill of links, and what has to be said of it."""

from pathlib import Path
from typing import Any

import pytest

from ftkit.core.errors import UsageError
from ftkit.launch.checker import Answer
from ftkit.launch.drill_catalogue import (
    BLACKHOLE,
    LINK_FAULTS,
    PARTITION,
    PARTITION_HALF,
    RANKS_MIN,
    SLOW_LINK,
    SLOW_NIC,
)
from ftkit.launch.drill_command import run_drills
from ftkit.launch.drill_plan import Drill, choose
from ftkit.launch.link_drills import apart, culprit, judge_link
from tests.launch.test_member_drills import event, outcome


def drill(fault: str, seed: int = 1) -> Drill:
    return choose(fault, None, seed=seed, nproc=RANKS_MIN[fault], steps=200)


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


HALVES = choose(PARTITION_HALF, None, seed=1, nproc=4, steps=200)


def half(*alone: int, size: int = 4, healed: bool = True) -> Any:
    """What is said when these seats commit in a world of their own, and `size` come together."""
    events = [event(0.5, "commit", seat=s, member=s, step=1, generation=1) for s in range(4)]
    events += [event(1.0, "drill", seat=s, member=s) for s in HALVES.seats]
    # A vote that had passed ends in a commit of the world that was.
    events.append(event(1.1, "commit", seat=HALVES.seats[0], member=9, step=2, generation=1))
    events += [event(2.0, "commit", seat=s, member=s, step=2, generation=2) for s in alone]
    events += [event(3.0, "healed")] if healed else []
    events.append(event(4.0, "decision", action="grown", members=list(range(size))))
    return judge_link(outcome(PARTITION_HALF), HALVES, 4, events)


def test_halves_are_two_and_every_way_between_them_is_cut() -> None:
    assert len(HALVES.seats) == 2
    cut = apart((2, 3), 4)
    assert {frozenset(p) for p in cut if min(p) >= 0} == {
        frozenset(p) for p in ((0, 2), (0, 3), (1, 2), (1, 3))
    }
    assert (-1, -4) in cut, "the coordinator does not reach node 2"
    assert (-2, -5) in cut, "nor does node 0's agent reach node 3"
    assert len(cut) == 10


def test_only_the_coordinators_half_may_go_on() -> None:
    near = [s for s in range(4) if s not in HALVES.seats]
    good = half(*near)
    assert good.outcome is Answer.PASS, good.evidence
    assert good.evidence["steps_apart"] == 1
    assert half(*near, HALVES.seats[0]).outcome is Answer.FAIL, "both halves trained"
    assert half().outcome is Answer.FAIL, "nobody did"
    assert half(*near, size=2).outcome is Answer.UNKNOWN, "they never came together"
    assert half(*near, healed=False).outcome is Answer.UNKNOWN


def test_halves_of_a_sharded_job_want_parity(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="give --parity"):
        run_drills(
            PARTITION_HALF, at=None, seed=1, count=1, run_dir=tmp_path, as_json=True, sharded=1
        )
