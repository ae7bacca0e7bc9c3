"""Older copies of another node's shards: whose, when, and that they are whole."""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from torch import nn

from ftkit.checkpoint.arena import arena_path
from ftkit.checkpoint.capture import Capture
from ftkit.checkpoint.fetch import fetch
from ftkit.checkpoint.provision import ensure_arena
from ftkit.checkpoint.serve import ArenaServer
from ftkit.checkpoint.state import ProtectedState
from ftkit.core.ids import Generation, JobId, NodeId, Seat, Step
from ftkit.core.inventory import Copy, Part
from ftkit.core.trace import Trace, read_run
from ftkit.launch.keeper import Keeper, due, ward_of

JOB, SECRET = JobId("keep"), b"s" * 32


def copy(seat: int, step: int, *, generation: int = 1, layout: str = "a", of: int = 3) -> Copy:
    part = Part(layout=layout, first=0, end=9, total=9, layouts=of)
    return Copy(
        seat=Seat(seat), node=NodeId(seat), path=f"{seat}", step=Step(step),
        generation=Generation(generation), part=part,
    )  # fmt: skip


def test_each_keeps_for_the_one_before_it_of_those_that_live() -> None:
    nodes = [NodeId(n) for n in (0, 2, 3)]
    assert {n: ward_of(n, nodes) for n in nodes} == {0: 3, 2: 0, 3: 2}
    assert ward_of(NodeId(1), nodes) is None
    assert ward_of(NodeId(0), [NodeId(0)]) is None


def test_a_copy_is_due_when_the_last_is_too_old_or_fits_no_more() -> None:
    there = [copy(1, 7), copy(1, 9)]
    assert due([], there, 100) == [there[1]]
    assert due([copy(1, 5)], there, 100) == []
    assert due([copy(1, 5)], [copy(1, 105)], 100) == [copy(1, 105)]
    for changed in (copy(1, 9, generation=2), copy(1, 9, layout="b")):
        assert due([copy(1, 8)], [changed], 100) == [changed]
    assert due([], [copy(1, 9, of=1)], 100) == [], "what every rank holds needs no older copy"


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[tuple[Capture, nn.Module, ArenaServer]]:
    """A rank of another node that captures, as one of two stages, and its node's byte server."""
    folder = tmp_path / "owner"
    folder.mkdir()
    model = nn.Linear(200, 200)
    state = ProtectedState(model=model)
    with ExitStack() as opened:
        path = arena_path(JOB, Seat(0), folder)
        arena = opened.enter_context(ensure_arena(path, state.layout(), chunk_bytes=4096))
        capture = opened.enter_context(Capture(arena, state))
        yield capture, model, opened.enter_context(ArenaServer(folder, JOB, SECRET))


def taken(capture: Capture, step: int) -> None:
    capture.begin(Step(step), Generation(1), layouts=2)
    capture.gate()


def kept_step(keeper: Keeper, step: int) -> bool:
    end = time.monotonic() + 10
    while time.monotonic() < end:
        copies = keeper.report()["copies"]
        assert isinstance(copies, list)
        if [c["step"] for c in copies] == [step]:
            return True
        time.sleep(0.02)
    return False


def test_the_kept_copy_outlives_its_owner_bit_for_bit(
    owner: tuple[Capture, nn.Module, ArenaServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ftkit.launch.keeper.LOOK_S", 0.02)
    capture, model, server = owner
    here = tmp_path / "here"
    here.mkdir()
    with Trace(tmp_path / "run" / "events" / "agent.jsonl") as trace:
        keeper = Keeper(
            JOB, NodeId(1), SECRET, here, trace, host="127.0.0.1", changed=lambda: None,
            every_steps=3,
        )  # fmt: skip
        try:
            keeper.take({NodeId(0): server.address, NodeId(1): ("127.0.0.1", 1)})
            taken(capture, 1)
            assert kept_step(keeper, 1)
            with torch.no_grad():
                model.get_parameter("weight").add_(1)
            taken(capture, 3)
            taken(capture, 4)
            assert kept_step(keeper, 4), "the older one goes once there is another"
            server.close()
            store = keeper.report()["store"]
            assert isinstance(store, list)
            host, port = store
            name = arena_path(JOB, Seat(0)).name
            with fetch((host, port), SECRET, name, Step(4), Generation(1)) as remote:
                data = b"".join(map(bytes, remote.blocks()))
            weight = model.get_parameter("weight").detach().numpy().tobytes()
            assert weight in data
        finally:
            keeper.close()
    assert [e["step"] for e in read_run(tmp_path / "run") if e["kind"] == "kept"] == [1, 4]
