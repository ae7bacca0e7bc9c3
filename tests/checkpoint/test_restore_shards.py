"""Which copies a rank reads its new shards from, and that what is damaged is struck."""

# mypy: allow-untyped-calls

from pathlib import Path

import pytest
import torch
from torch import nn

from ftkit.checkpoint.arena import Arena, arena_path
from ftkit.checkpoint.box import Box, TensorBox
from ftkit.checkpoint.capture import Capture
from ftkit.checkpoint.copies import local_copies
from ftkit.checkpoint.layout import StateLayout
from ftkit.checkpoint.provision import ensure_arena
from ftkit.checkpoint.restore_shards import Incomplete, order, restore_shards, whole_layout
from ftkit.checkpoint.state import ProtectedState
from ftkit.core.errors import IntegrityError
from ftkit.core.ids import Generation, JobId, NodeId, Seat, Step
from ftkit.core.inventory import Copy, Inventory, Part, Tier

JOB, NODE, STEP = JobId("t"), NodeId(0), Step(5)


def copy_of(seat: int, node: int, *, tier: Tier = Tier.ARENA) -> Copy:
    part = Part(layout=f"l{seat}", first=0, end=9, total=9, layouts=4)
    return Copy(
        seat=Seat(seat), node=NodeId(node), path=f"/{seat}", step=STEP, generation=Generation(1),
        part=part, tier=tier,
    )  # fmt: skip


def test_its_own_arena_first_then_its_node_then_the_next_nodes() -> None:
    copies = [copy_of(s, s // 2) for s in range(8)] + [copy_of(9, 1, tier=Tier.PARITY)]
    servers = {NodeId(n): ("h", n) for n in (0, 2, 3)}
    found = order(copies, seat=Seat(3), node=NodeId(1), servers=servers)
    assert [(c.seat, server) for c, server in found] == [
        (3, None), (2, None), (4, ("h", 2)), (5, ("h", 2)), (6, ("h", 3)), (7, ("h", 3)),
        (0, ("h", 0)), (1, ("h", 0)),
    ]  # fmt: skip
    assert order(copies, seat=Seat(3), node=NodeId(1), servers={}) == found[:2]


def test_the_whole_of_a_layout_has_room_for_every_cut() -> None:
    def boxes(first: int, count: int) -> StateLayout:
        return StateLayout.of_boxes(
            [
                TensorBox("w", "float32", (7, 3), Box((first, 0), (count, 3))),
                TensorBox("s", "float32", (), Box((), ())),
            ]
        )

    parts = [boxes(0, 3), boxes(3, 3), boxes(6, 1)]
    wholes = {whole_layout(part).digest for part in parts}
    assert wholes == {whole_layout(boxes(0, 7)).digest}
    assert all(whole_layout(p).total_bytes >= p.total_bytes for p in parts)


def captured(folder: Path) -> tuple[ProtectedState, nn.Module]:
    """A state of one rank, with its step in an arena."""
    model = nn.Linear(300, 300)
    state = ProtectedState(model=model)
    with (
        ensure_arena(arena_path(JOB, Seat(0), folder), state.layout(), chunk_bytes=4096) as arena,
        Capture(arena, state) as capture,
    ):
        capture.begin(STEP, Generation(1))
        capture.gate()
    return state, model


def load(folder: Path, state: ProtectedState, step: Step = STEP) -> int:
    inventory = Inventory(copies=tuple(local_copies(JOB, folder, NODE)))
    return restore_shards(
        inventory, state, step=step, seat=Seat(1), node=NODE, servers={}, secret=b""
    ).moved


def test_a_step_comes_back_from_another_seats_arena(tmp_path: Path) -> None:
    state, model = captured(tmp_path)
    before = model.state_dict()["weight"].clone()
    with torch.no_grad():
        model.get_parameter("weight").zero_()
    assert load(tmp_path, state) == 4 * (300 * 300 + 300)
    assert torch.equal(model.get_parameter("weight"), before)
    with pytest.raises(Incomplete, match="steps \\[5\\]"):
        load(tmp_path, state, Step(6))


def test_what_is_damaged_is_struck_and_then_nowhere(tmp_path: Path) -> None:
    state, _ = captured(tmp_path)
    path = arena_path(JOB, Seat(0), tmp_path)
    with Arena.open(path, writable=True) as arena:
        arena.data_to_mend(arena.find(STEP))[70_000] ^= 1
    with pytest.raises(IntegrityError, match="no good copy"):
        load(tmp_path, state)
    with Arena.open(path) as arena:
        assert list(arena.sealed_steps()) == []
    with pytest.raises(Incomplete):
        load(tmp_path, state)
