"""What is uneven without anybody's fault is reported as that; loaders and collectors are labelled."""

import pytest

from ftkit.core.verdict import Fault
from tests.detection.pace import Pace, slow


def test_another_one_is_last_each_step() -> None:
    pace = Pace(8)
    verdicts = pace.last(40, lambda seat, step: 1.4 if seat == (5 * step) % 8 else 1.0)
    (verdict,) = verdicts
    assert (verdict.fault, verdict.evidence["kind"]) == (Fault.IMBALANCE, "rotating")
    assert verdict.evidence["factor"] == pytest.approx(1.4, rel=0.03)
    assert "nobody is at fault" in verdict.reason


def test_the_last_stage_has_more_to_do() -> None:
    pace = Pace(16, stages=4)
    last = lambda seat, step: 1.18 if seat % 4 == 3 else 1.0
    (verdict,) = pace.last(40, last)
    assert (verdict.fault, verdict.seat) == (Fault.IMBALANCE, 3)
    assert (verdict.evidence["kind"], verdict.evidence["role"]) == ("role", "pp=3")
    assert verdict.evidence["factor"] == pytest.approx(1.18, rel=0.02)
    assert verdict.evidence["seats"] == [3, 7, 11, 15]


def test_a_slow_member_is_no_imbalance_of_its_role() -> None:
    pace = Pace(16, stages=4)
    assert {f for f, _ in pace.ever(60, slow(3, by=3.0))} == {Fault.SLOW}


def test_even_work_is_not_reported() -> None:
    assert Pace(8, noise=0.01).ever(60) == set()


@pytest.mark.parametrize(
    ("fault", "change"),
    [
        (Fault.DATA_STALL, {"seconds": {"data": 3.0, "forward": 2.0}}),
        (Fault.GC_STALL, {"seconds": {"data": 0.01, "forward": 5.0}, "gc_s": 3.0}),
    ],
)
def test_a_stall_is_labelled_in_the_same_step_and_accuses_nobody(fault, change) -> None:
    pace = Pace(4)
    pace.last(20)
    stall = lambda seat, step: change if seat == 2 and step == 3 else {}
    standing = list(pace.play(30, change=stall))
    assert standing[2] == []
    (verdict,) = standing[3]
    assert (verdict.fault, verdict.seat) == (fault, 2)
    assert verdict.evidence["seconds"] == pytest.approx(3.0)
    assert not verdict.evicts
    assert standing[-1] == []


def test_a_stall_in_every_second_step_is_one_verdict_and_still_no_slow_rank() -> None:
    pace = Pace(4)
    pace.last(20)
    stall = lambda seat, step: (
        {"seconds": {"data": 2.0, "forward": 2.0}} if seat == 2 and step % 4 == 0 else {}
    )
    assert pace.ever(60, change=stall) == {(Fault.DATA_STALL, 2)}
    (verdict,) = pace.last(1, change=stall)
    assert verdict.evidence["times"] == 16
    assert verdict.reason.endswith("it is the last of 16 close together")


def test_a_loader_that_always_takes_long_does_not_stall() -> None:
    pace = Pace(4)
    heavy = lambda seat, step: {"seconds": {"data": 1.5, "forward": 2.0}}
    assert pace.ever(40, change=heavy) <= {(Fault.DATA_STALL, s) for s in range(4)}
    assert pace.last(20, change=heavy) == []
