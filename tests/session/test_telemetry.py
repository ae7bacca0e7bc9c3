"""What a rank's step loop leaves in shared memory about its steps."""

import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from ftkit.collectives.handle import Handle, blocked_s
from ftkit.core.ids import MemberId
from ftkit.detection.row import Phase
from ftkit.detection.status import StatusBoard
from ftkit.session.role import of_mesh
from tests.session.alone import SLOTS, Points, alone, learn, net


@pytest.fixture
def boards(monkeypatch):
    """The board of the session that is alone."""
    made: list[StatusBoard] = []
    create = StatusBoard.create

    def keep(path: Path, *, seats: int) -> StatusBoard:
        made.append(create(path, seats=seats))
        return made[-1]

    monkeypatch.setattr(StatusBoard, "create", keep)
    return made


def test_each_step_that_counts_leaves_where_its_time_went(boards) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    with alone() as session:
        session.role("stage 1", place="pp=1")
        session.protect(model=model, optimizer=optimizer)
        for step in session.steps(Points(), slots=SLOTS, slot_size=2, until=3):
            with step:
                learn(model, step)
                time.sleep(0.02)
                optimizer.step()
            losses.append(step.loss)
            if step.index == 2:
                time.sleep(0.02)
        found = boards[0].steps(0, member=MemberId(0))
    assert [r.step for r in found] == [1, 2, 3]
    assert [r.loss for r in found] == pytest.approx(losses)
    for record in found:
        assert (record.slots, record.role, record.place) == (SLOTS, "stage 1", "pp=1")
        assert record.seconds[Phase.FORWARD] >= 0.02
        assert record.seconds[Phase.DATA] > 0
        assert (record.cpu_s or 0.0) > 0
    assert found[2].seconds[Phase.BETWEEN] >= 0.02


def test_a_step_that_comes_round_again_is_recorded_once(boards) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    raised = False
    with alone() as session:
        session.protect(model=model, optimizer=optimizer)
        for step in session.steps(Points(), slots=SLOTS, slot_size=2, until=2):
            try:
                with step:
                    learn(model, step)
                    if not raised:
                        raised = True
                        raise KeyError("once")
                    optimizer.step()
            except KeyError:
                pass
        found = boards[0].steps(0, member=MemberId(0))
    assert [(r.step, r.slots) for r in found] == [(1, SLOTS), (2, SLOTS)]


def test_waiting_for_a_collective_is_counted_and_a_wait_that_is_over_is_not() -> None:
    before = blocked_s()
    handle: Handle[int] = Handle()
    with pytest.raises(TimeoutError):
        handle.wait(0.01)
    waited = blocked_s() - before
    assert waited >= 0.01
    handle.finish(1)
    handle.wait()
    assert blocked_s() - before == waited


def test_stages_are_roles_and_replicas_are_not() -> None:
    dist.init_process_group("fake", rank=5, world_size=8, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("pp", "dp", "tp"))
        assert of_mesh(mesh) == ("pp=1", "pp=1 dp=0 tp=1")
        assert of_mesh(mesh["dp"]) == ("", "dp=0")
        assert of_mesh(init_device_mesh("cpu", (8,))) == ("", "d0=5")
    finally:
        dist.destroy_process_group()
