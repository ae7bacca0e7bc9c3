"""Data that comes slowly in every step is labelled with its rank or node, and accuses nobody."""

from collections.abc import Callable
from typing import Any

from ftkit.core.verdict import ACCUSES_NOBODY, Fault
from ftkit.detection.slow_reads import STEPS
from tests.detection.pace import Pace


def reads(*seats: int, seconds: float) -> Callable[[int, int], dict[str, Any]]:
    """These seats wait so long for their data in every step, the others 10 ms."""
    return lambda seat, step: (
        {"seconds": {"data": seconds if seat in seats else 0.01, "forward": 2.0}}
    )


def test_a_rank_whose_data_always_comes_late_is_labelled() -> None:
    pace = Pace(8)
    (verdict,) = pace.last(STEPS + 4, change=reads(5, seconds=0.6))
    assert (verdict.fault, verdict.seat) == (Fault.DATA_STALL, 5)
    assert verdict.fault in ACCUSES_NOBODY
    assert not verdict.evicts
    assert "waits 0.60 s for its loader in every step, the others 0.01 s" in verdict.reason
    assert verdict.evidence["nodes"] == [], "its neighbour on the node is as the others are"
    assert pace.last(STEPS, change=reads(seconds=0.0)) == [], "it is over"


def test_a_node_is_named_when_all_of_its_ranks_are_slow() -> None:
    for size in (8, 4):  # of two nodes it is the slower one
        verdicts = Pace(size).last(STEPS + 4, change=reads(2, 3, seconds=0.6))
        assert {v.seat for v in verdicts} == {2, 3}
        assert all(v.reason.endswith("all ranks of nodes [1]") for v in verdicts)


def test_a_data_set_that_is_slow_for_all_and_small_differences_are_none() -> None:
    assert Pace(8).ever(40, change=reads(*range(8), seconds=0.9)) == set()
    assert Pace(8).ever(40, change=reads(3, seconds=0.1)) == set(), "of a step of two seconds"
    few = Pace(8)
    assert few.ever(STEPS - 4, change=reads(3, seconds=0.2)) == set(), "too few steps"
