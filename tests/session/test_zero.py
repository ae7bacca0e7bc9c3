"""An optimizer in blocks comes to the bits of the whole one, wherever its blocks are."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import ftkit
from ftkit.checkpoint.arena import arena_path
from ftkit.checkpoint.capture import Capture
from ftkit.checkpoint.copies import local_copies
from ftkit.checkpoint.provision import ensure_arena
from ftkit.checkpoint.restore_shards import restore_shards
from ftkit.checkpoint.state import ProtectedState
from ftkit.core.errors import IntegrityError, UsageError
from ftkit.core.ids import Generation, JobId, NodeId, Seat, Step
from ftkit.core.inventory import Inventory
from ftkit.core.world import World
from ftkit.recovery.promotion import fresh, settle
from ftkit.session.membership import Entry
from ftkit.session.worlds import Worlds
from ftkit.session.zero import ZeroOptimizer
from tests.session.alone import SLOTS, Points, alone, bits, learn, net, train

JOB, NODE, STEP, BLOCKS = JobId("t"), NodeId(0), Step(3), 12


def layers() -> nn.Module:
    """One parameter without dimensions among them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    model.register_parameter("scale", nn.Parameter(torch.tensor(1.5)))
    return model


def groups(model: nn.Module) -> list[dict[str, Any]]:
    weights = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    return [{"params": weights, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]


def draw(model: nn.Module, step: int) -> None:
    """Gradients that are a function of the step."""
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def whole(steps: int, kind: Any = torch.optim.AdamW) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = layers()
    optimizer = kind(groups(model), lr=0.05)
    for step in range(steps):
        draw(model, step)
        optimizer.step()
    return model, optimizer


class Ranks:
    """Four ranks in one process, each with its own blocks; rows go round by assignment."""

    def __init__(self, kind: Any = torch.optim.AdamW) -> None:
        held = fresh([Seat(s) for s in range(4)], BLOCKS)
        placement = settle(held, BLOCKS)
        self.models = [layers() for _ in range(4)]
        self.optimizers = [ZeroOptimizer(groups(m), kind, lr=0.05) for m in self.models]
        for seat, optimizer in enumerate(self.optimizers):
            optimizer.cut(BLOCKS)
            optimizer.hold(held[Seat(seat)])
            optimizer.owned = placement.owned(Seat(seat))

    def train(self, steps: int) -> None:
        for step in range(steps):
            for model, optimizer in zip(self.models, self.optimizers, strict=True):
                draw(model, step)
                optimizer.step()
            rows = {
                i: piece.rows.detach().clone()
                for optimizer in self.optimizers
                for i, piece in enumerate(optimizer.pieces)
                if piece.block in optimizer.owned
            }
            with torch.no_grad():
                for optimizer in self.optimizers:
                    for i, piece in enumerate(optimizer.pieces):
                        piece.rows.copy_(rows[i])


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.NAdam, torch.optim.Adagrad])
def test_four_ranks_come_to_the_bits_of_one(kind: Any) -> None:
    model, optimizer = whole(3, kind)
    ranks = Ranks(kind)
    ranks.train(3)
    for mine in ranks.models:
        assert bits(mine) == bits(model)
    placed = {
        id(mine): whole_one
        for copy in ranks.models
        for mine, whole_one in zip(copy.parameters(), model.parameters(), strict=True)
    }
    for other in ranks.optimizers:
        assert 0 < len(other.inner.state) < len(other.pieces)
        for piece in other.pieces:
            parts = other.inner.state.get(piece.rows, {})
            place = placed[id(piece.parameter)]
            for key, value in parts.items():
                same = optimizer.state[place][key]
                assert torch.equal(value, same[piece.box.slices] if value.dim() else same), key


def test_alone_it_is_the_optimizer_it_is_made_of() -> None:
    model, reference = net(), train(5)
    with alone() as session:
        optimizer = ftkit.ZeroOptimizer(model.parameters(), torch.optim.AdamW, lr=0.05)
        session.protect(model=model, optimizer=optimizer)
        for step in session.steps(Points(), slots=SLOTS, slot_size=2, until=5):
            with step:
                learn(model, step)
                optimizer.step()
    assert bits(model) == reference


def test_rows_follow_a_parameter_that_is_given_other_memory() -> None:
    """As by `model.to(...)`, after the optimizer was made."""
    reference, _ = whole(3)
    model = layers()
    optimizer = ZeroOptimizer(groups(model), torch.optim.AdamW, lr=0.05)
    for step in range(3):
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        draw(model, step)
        optimizer.step()
    assert bits(model) == bits(reference)


def test_schedulers_and_the_script_set_hyperparameters() -> None:
    model = layers()
    optimizer = ZeroOptimizer(groups(model), torch.optim.SGD, lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.0)
    draw(model, 0)
    optimizer.step()
    scheduler.step()
    before = bits(model)
    draw(model, 1)
    optimizer.step()
    assert bits(model) == before, "with a learning rate of 0"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda p: ftkit.ZeroOptimizer(p, torch.optim.LBFGS), "more than one element"),
        (lambda p: ftkit.ZeroOptimizer(p, torch.optim.AdamW, fused=True), "fused"),
    ],
)
def test_what_cannot_be_cut_is_refused(make: Any, said: str) -> None:
    model = net()
    with alone() as session, pytest.raises(UsageError, match=said):
        session.protect(model=model, optimizer=make(list(model.parameters())))


def test_nobody_has_the_whole_of_it() -> None:
    optimizer = ZeroOptimizer(layers().parameters(), torch.optim.Adam)
    with pytest.raises(UsageError, match=r"session\.protect"):
        optimizer.state_dict()
    with pytest.raises(UsageError, match=r"session\.protect"):
        optimizer.load_state_dict({})
    with pytest.raises(UsageError, match="all its parameters"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})


def elements(state: ProtectedState) -> int:
    return sum(entry.box.elements for entry in state.layout().entries)


def captured(folder: Path, states: list[ProtectedState]) -> Inventory:
    """Each state in the arena of its seat."""
    for seat, state in enumerate(states):
        path = arena_path(JOB, Seat(seat), folder)
        with (
            ensure_arena(path, state.room(), chunk_bytes=1024) as arena,
            Capture(arena, state) as capture,
        ):
            capture.begin(STEP, Generation(1), layouts=len(states))
            capture.gate()
    return Inventory(copies=tuple(local_copies(JOB, folder, NODE)))


def load(inventory: Inventory, state: ProtectedState) -> None:
    restore_shards(inventory, state, step=STEP, seat=Seat(9), node=NODE, servers={}, secret=b"")


def test_a_snapshot_of_blocks_is_that_of_a_whole_optimizer_and_the_other_way_round(
    tmp_path: Path,
) -> None:
    ranks = Ranks()
    ranks.train(3)
    states = [
        ProtectedState(model=m, optimizer=o)
        for m, o in zip(ranks.models, ranks.optimizers, strict=True)
    ]
    model, optimizer = whole(3)
    total = elements(ProtectedState(model=model, optimizer=optimizer))
    assert max(map(elements, states)) < total / 2, "each captures its own rows"

    (tmp_path / "blocks").mkdir()
    inventory = captured(tmp_path / "blocks", states)
    plain = layers()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.zero_()
    fresh_one = torch.optim.AdamW(groups(plain), lr=0.0)
    load(inventory, ProtectedState(model=plain, optimizer=fresh_one))
    assert bits(plain) == bits(model)
    assert fresh_one.param_groups[0]["lr"] == 0.05
    for mine, other in zip(plain.parameters(), model.parameters(), strict=True):
        for key, value in optimizer.state[other].items():
            assert torch.equal(fresh_one.state[mine][key], value), key

    (tmp_path / "whole").mkdir()
    inventory = captured(tmp_path / "whole", [ProtectedState(model=model, optimizer=optimizer)])
    again = Ranks()
    for net_again, cut, state in zip(again.models, again.optimizers, states, strict=True):
        load(inventory, ProtectedState(model=net_again, optimizer=cut))
        assert bits(net_again) == bits(model)
        before = ranks.optimizers[states.index(state)]
        for piece, same in zip(cut.pieces, before.pieces, strict=True):
            have, had = cut.inner.state.get(piece.rows, {}), before.inner.state.get(same.rows, {})
            assert have.keys() == had.keys()
            assert all(torch.equal(have[k], had[k]) for k in have)


def test_what_was_trained_is_no_initial_state() -> None:
    """Where no snapshot is left either, processes end, and new ones begin."""
    nothing: Any = SimpleNamespace(enter=lambda world, step: None, trained=True)
    worlds = Worlds(nothing)
    worlds._blocks, worlds._snapshots = nothing, nothing
    world = World(generation=Generation(2), members=())
    with pytest.raises(IntegrityError, match="training begins anew"):
        worlds._restore(Entry(world, Step(0), False))
