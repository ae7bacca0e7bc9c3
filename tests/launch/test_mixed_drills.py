"""One to three faults in one run: whom, and where, and what the checker asks of each."""

import pytest

from ftkit.core.errors import UsageError
from ftkit.core.fault_plan import KILL_COORDINATOR, Kind, Point
from ftkit.launch.drill_catalogue import OF_BUCKETS
from ftkit.launch.drill_plan import choose
from ftkit.launch.mixed_drills import MIXED, POINTS
from ftkit.launch.report_history import read_history
from ftkit.launch.report_incidents import read_incidents

DRILLS = [choose(MIXED, None, seed=s, nproc=4, steps=150) for s in range(300)]


def test_one_to_three_faults_strike_different_ranks_and_somebody_survives() -> None:
    counts = set()
    for drill in DRILLS:
        faults = drill.faults()
        assert drill.mixed is not None
        assert len({f.seat for f in faults}) == len(faults) <= 3
        assert all(f.member == f.seat for f in faults), "who replaces one is spared"
        assert [f.step for f in faults] == sorted(f.step for f in faults)
        assert faults or drill.mixed.coordinator_step is not None
        counts.add(drill.mixed.count)
    assert counts == {1, 2, 3}
    coordinators = sum(d.mixed.coordinator_step is not None for d in DRILLS if d.mixed)
    assert 50 < coordinators < 100


def test_every_fault_can_strike_where_it_is_to() -> None:
    for drill in DRILLS:
        for i, fault in enumerate(drill.faults()):
            assert fault.bucket == 0 or fault.point in OF_BUCKETS
            if fault.kind is not Kind.KILL:
                assert fault.point not in (Point.RECOVERY, Point.IN_COLLECTIVE)
            assert i or fault.point is not Point.RECOVERY
    points = {f.point for d in DRILLS for f in d.faults()}
    assert points == set(POINTS)


def test_a_seed_is_a_drill() -> None:
    assert choose(MIXED, None, seed=7, nproc=4, steps=150) == DRILLS[7]
    assert DRILLS[7].where != DRILLS[8].where


def test_three_may_be_lost_so_four_are_needed() -> None:
    with pytest.raises(UsageError, match="--nproc 4 or more"):
        choose(MIXED, None, seed=0, nproc=3, steps=150)
    with pytest.raises(UsageError, match="leave --at out"):
        choose(MIXED, "vote", seed=0, nproc=4, steps=150)


def test_a_coordinator_that_dies_beside_ranks_takes_nobody_with_it() -> None:
    """Asked for a victim and a newer generation, it could not be judged."""
    died = {"mono": 2.0, "kind": "drill", "fault": KILL_COORDINATOR, "phase": "any", "step": 3}
    (incident,) = read_incidents(read_history([died]), evicts=True)
    assert incident.unknown == ("kill-coordinator at any: no survivor was training before it",)
