"""Which snapshot goes to disk, how an attempt moves on, and every way in which it ends."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftkit.core.errors import ProtocolError
from ftkit.core.ids import Generation, NodeId, Seat, Step
from ftkit.core.inventory import Copy, Part
from ftkit.launch.checkpointing import Order, OrderEnd, Report, Stage, judge


def third(node: int, step: int = 10, generation: int = 1) -> Copy:
    """One of three nodes' parts of a snapshot."""
    return Copy(
        seat=Seat(node),
        node=NodeId(node),
        path=f"seat-{node}",
        step=Step(step),
        generation=Generation(generation),
        part=Part(layout="a", first=node, end=node + 1, total=3),
    )


def due(*steps: int, nodes: tuple[int, ...] = (0, 1, 2)) -> dict[NodeId, Report]:
    return {NodeId(n): Report(due=tuple(third(n, s) for s in steps)) for n in nodes}


def begun() -> Order:
    order, outcome = judge(None, due(10), last_attempt=41)
    assert order is not None
    assert outcome is None
    return order


def reports(order: Order, *done: Stage, error: str = "") -> dict[NodeId, Report]:
    """Every node at its stage; the last node may have failed."""
    found = {NodeId(n): Report(attempt=order.attempt, done=stage) for n, stage in enumerate(done)}
    last = max(found)
    return found | {last: replace(found[last], error=error)}


def test_the_newest_snapshot_that_is_due_everywhere_is_written() -> None:
    order, _ = judge(None, due(10, 20), last_attempt=41)
    assert order is not None
    assert (order.step, order.attempt, order.stage) == (20, 42, Stage.BEGIN)
    assert order.committer == 0
    assert order.writers == (0, 1, 2)
    assert {c.step for c in order.copies} == {20}


def test_a_snapshot_that_one_node_skipped_is_not_written() -> None:
    assert judge(None, due(10, nodes=(0, 2)), last_attempt=0) == (None, None)
    mixed = due(10) | due(10, 20, nodes=(1, 2))
    order, _ = judge(None, mixed, last_attempt=0)
    assert order is not None
    assert order.step == 10


def test_a_newer_generation_wins_over_a_higher_step() -> None:
    known = {
        n: replace(r, due=(*r.due, third(n, step=5, generation=2))) for n, r in due(10).items()
    }
    order, _ = judge(None, known, last_attempt=0)
    assert order is not None
    assert order.step == 5


def test_an_attempt_goes_through_its_stages_and_ends_in_a_checkpoint() -> None:
    order: Order | None = begun()
    for stage in (Stage.BEGIN, Stage.CLEAR, Stage.WRITE):
        assert order is not None
        assert order.stage is stage
        waiting = reports(order, stage, stage, Stage(stage - 1))
        assert judge(order, waiting, last_attempt=42) == (order, None)
        order, outcome = judge(order, reports(order, stage, stage, stage), last_attempt=42)
        assert outcome is None
    assert order is not None
    assert order.stage is Stage.COMMIT
    done = reports(order, Stage.COMMIT, Stage.WRITE, Stage.WRITE)
    assert judge(order, done, last_attempt=42) == (None, OrderEnd(step=Step(10), failed=""))


def test_what_was_committed_before_is_done_at_once() -> None:
    order = begun()
    known = reports(order, Stage.COMMIT, Stage.NOTHING, Stage.NOTHING)
    assert judge(order, known, last_attempt=42) == (None, OrderEnd(step=Step(10), failed=""))


def test_nobody_begins_before_all_have_ended_what_they_did_before() -> None:
    order = begun()
    known = reports(order, Stage.BEGIN, Stage.BEGIN, Stage.BEGIN)
    late = known | {NodeId(2): Report(attempt=order.attempt - 1, done=Stage.COMMIT, error="old")}
    assert judge(order, late, last_attempt=42) == (order, None)
    # A fourth node writes nothing now, and still writes what is given up.
    idle = {NodeId(3): Report(attempt=order.attempt - 1, done=Stage.CLEAR)}
    assert judge(order, known | idle, last_attempt=42) == (order, None)
    ended = {NodeId(3): Report(attempt=order.attempt)}
    assert judge(order, known | ended, last_attempt=42) == (replace(order, stage=Stage.CLEAR), None)


@pytest.mark.parametrize("stage", [Stage.BEGIN, Stage.CLEAR, Stage.WRITE, Stage.COMMIT])
def test_a_node_that_fails_or_is_lost_gives_the_step_up(stage: Stage) -> None:
    order = replace(begun(), stage=stage)
    before = Stage(stage - 1)
    failing = reports(order, before, before, before, error="it is full")
    assert judge(order, failing, last_attempt=42) == (
        None,
        OrderEnd(step=Step(10), failed="node 2: it is full"),
    )
    lost = {n: r for n, r in reports(order, before, before, before).items() if n != 1}
    assert judge(order, lost, last_attempt=42) == (
        None,
        OrderEnd(step=Step(10), failed="node 1 was lost"),
    )


def test_the_next_one_has_a_higher_number_and_another_committer_once_the_first_is_lost() -> None:
    known = {
        NodeId(n): Report(attempt=42, error="it is full", due=(third(n, 20),)) for n in (0, 1, 2)
    }
    order, _ = judge(None, known, last_attempt=42)
    assert order is not None
    assert order.attempt == 43
    whole = replace(third(1, 30), part=Part(layout="a", first=0, end=3, total=3))
    order, _ = judge(None, {NodeId(1): Report(due=(whole,))}, last_attempt=43)
    assert order is not None
    assert order.committer == 1


@given(
    st.lists(st.lists(st.sampled_from(Stage), min_size=3, max_size=3), max_size=8),
    st.lists(st.booleans(), min_size=8, max_size=8),
)
def test_no_stage_is_left_before_every_node_has_done_it(
    told: list[list[Stage]], failing: list[bool]
) -> None:
    order: Order | None = begun()
    for stages, fails in zip(told, failing, strict=False):
        assert order is not None
        now = reports(order, *stages, error="no" if fails else "")
        after, outcome = judge(order, now, last_attempt=42)
        committed = stages[0] is Stage.COMMIT
        if after is None:
            assert outcome is not None
            assert fails or committed
            return
        assert not fails
        assert not committed
        if after.stage is not order.stage:
            assert after.stage == order.stage + 1
            assert all(stage >= order.stage for stage in stages)
        order = after


def test_orders_and_reports_come_back_from_json_and_nonsense_does_not() -> None:
    order = begun()
    assert Order.from_json(json.loads(json.dumps(order.to_json()))) == order
    report = Report(attempt=3, done=Stage.WRITE, error="e", due=(third(1),))
    assert Report.from_json(json.loads(json.dumps(report.to_json()))) == report
    for value in ({}, {**order.to_json(), "stage": 9}, {**order.to_json(), "copies": 1}):
        with pytest.raises(ProtocolError, match="not an order"):
            Order.from_json(value)
    with pytest.raises(ProtocolError, match="not a report"):
        Report.from_json({"attempt": 1})
