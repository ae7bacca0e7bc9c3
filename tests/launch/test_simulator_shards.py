"""A simulated job of sharded state: what is whole, and what becomes of the job where nothing is."""

from functools import partial

import pytest

from ftkit.core.ids import Generation, NodeId, Seat, Step
from ftkit.launch import simulator, simulator_hosts
from ftkit.launch.replacement_wait import ReplacementWait
from ftkit.launch.simulator import SimulatedEnd, Simulation
from ftkit.launch.simulator_checks import SHARDS_GONE, TrainingState
from ftkit.launch.simulator_faults import Fault, Kind
from ftkit.launch.simulator_shards import SHARDS_KEPT, Shard
from ftkit.recovery.waiting import OnLoss


@pytest.fixture(autouse=True)
def sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulator, "SHARDED", 1.0)


def lose_a_node(
    seed: int, *, parity: int, nodes_lost: int = 1, kind: Kind = Kind.LOSE_NODE
) -> SimulatedEnd:
    """A job on three nodes that loses some of them, one right after the other."""
    faults = [
        Fault(kind=kind, target=t, duration_s=1.0, at_s=5.0 + t / 50)
        for t in range(0, 2 * nodes_lost, 2)
    ]
    job = Simulation(seed, ranks=21, faults=faults)
    job.endless, job.until, job.step_s = False, 30, 0.3
    job.shards = type(job.shards)(job, parity)
    assert job.nodes == 3
    return job.run()


def test_a_lost_node_without_parity_ends_the_job_with_the_reason() -> None:
    for seed in range(3):
        stop = lose_a_node(seed, parity=0).stop
        assert (stop.code, SHARDS_GONE in stop.reason) == (70, True)


def test_those_who_are_left_tell_a_new_coordinator_how_far_the_job_had_come() -> None:
    for seed in range(3):
        stop = lose_a_node(seed, parity=0, kind=Kind.LOSE_NODE_AND_COORDINATOR).stop
        assert (stop.code, SHARDS_GONE in stop.reason) == (70, True)


def test_with_parity_the_job_goes_on_from_what_is_rebuilt() -> None:
    for seed in range(3):
        assert lose_a_node(seed, parity=1).stop.code == 0


def test_more_nodes_than_parity_outlives_end_the_job() -> None:
    assert SHARDS_GONE in lose_a_node(0, parity=1, nodes_lost=3).stop.reason


@pytest.mark.parametrize("kind", [Kind.KILL_RANK, Kind.KILL_SEVERAL, Kind.KILL_ALL, Kind.STOP_RANK])
def test_ranks_that_die_leave_their_shards(kind: Kind) -> None:
    for seed in range(4):
        fault = Fault(kind=kind, target=1, duration_s=4.0, point="committed", nth=13 + seed)
        job = Simulation(seed, faults=[fault])
        job.endless, job.until, job.step_s = False, 14, 0.3
        assert job.run().stop.code == 0


def test_only_what_all_shards_are_left_of_is_whole() -> None:
    shards = Simulation(0, ranks=3, faults=[]).shards
    state = TrainingState().after(Generation(1))
    for rank in (0, 1):
        shard = Shard(state=state, generation=Generation(1), rank=rank, size=3)
        shards.seal(NodeId(0), Seat(rank), shard)
    assert shards.inventory([NodeId(0)]).newest_complete() is None
    assert shards.find(Step(1)) is None
    shards.seal(NodeId(0), Seat(2), Shard(state=state, generation=Generation(1), rank=2, size=3))
    assert shards.find(Step(1)) is state
    for _ in range(SHARDS_KEPT):
        state = state.after(Generation(1))
        shards.seal(
            NodeId(0), Seat(2), Shard(state=state, generation=Generation(1), rank=2, size=3)
        )
    assert shards.find(Step(1)) is None, "the arena has no room for it any more"


@pytest.mark.parametrize("seed", [4, 33, 44, *range(50, 70)])
def test_who_waits_for_replacements_whatever_happens_comes_to_an_end(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first three, newcomers are ready that have not begun to step: all together they will do."""
    monkeypatch.setattr(simulator_hosts, "ReplacementWait", partial(ReplacementWait, OnLoss.WAIT))
    Simulation(seed).run()
