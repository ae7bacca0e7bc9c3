"""A stage made of its neighbours: which layers of which, by what weights, and with what rate."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from ftkit.checkpoint.arena import arena_path
from ftkit.checkpoint.capture import Capture
from ftkit.checkpoint.copies import local_copies
from ftkit.checkpoint.provision import ensure_arena
from ftkit.checkpoint.restore_shards import (
    Incomplete,
    Older,
    Patch,
    ShardsRestored,
    restore_shards,
    with_older,
)
from ftkit.checkpoint.sources import SnapshotSource
from ftkit.checkpoint.standalone import save
from ftkit.checkpoint.state import ProtectedState
from ftkit.core.errors import IntegrityError, UsageError
from ftkit.core.ids import Generation, JobId, NodeId, Seat, Step
from ftkit.core.inventory import Inventory
from ftkit.recovery.approximation import Approximation
from ftkit.recovery.policy import Option
from ftkit.session.mean_stage import MeanStage, copied_name, layer_of, layers_in
from ftkit.session.patch import patch_of
from ftkit.session.raised_rate import raise_rate

JOB, NODE, WIDTH = JobId("mean"), NodeId(0), 6


class Layers(nn.Module):
    """Some layers of a pipeline, named by their numbers in the whole; of width 7 where `odd`."""

    def __init__(self, held: range, value: float, *, odd: bool = False) -> None:
        super().__init__()
        width = WIDTH + odd
        self.layers = nn.ModuleDict({str(i): nn.Linear(width, width) for i in held})
        with torch.no_grad():
            for i, layer in self.layers.items():
                for parameter in layer.parameters():
                    parameter.fill_(value + int(i))

    @property
    def weights(self) -> list[torch.Tensor]:
        return [p for name, p in self.named_parameters() if name.endswith("weight")]

    def state(self) -> tuple[ProtectedState, torch.optim.AdamW]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.5)
        return ProtectedState(model=self, optimizer=optimizer), optimizer


def stepped(stage: Layers) -> ProtectedState:
    """With moments of its own."""
    state, optimizer = stage.state()
    before = [p.detach().clone() for p in stage.parameters()]
    for parameter in stage.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with torch.no_grad():
        for parameter, value in zip(stage.parameters(), before, strict=True):
            parameter.copy_(value)
    return state


def captured(
    folder: Path, seat: int, stage: Layers, step: int, beside: Mapping[str, torch.Tensor] = {}
) -> Path:
    path, state = arena_path(JOB, Seat(seat), folder), stepped(stage)
    state.beside(beside)
    with (
        ensure_arena(path, state.layout(), chunk_bytes=4096) as arena,
        Capture(arena, state) as capture,
    ):
        capture.begin(Step(step), Generation(1), layouts=3)
        capture.gate()
    return path


def source(opened: ExitStack, folder: Path, seat: int, step: int) -> SnapshotSource:
    arena = opened.enter_context(
        ensure_arena(arena_path(JOB, Seat(seat), folder), ProtectedState(model=nn.Linear(1, 1)).layout())
    )  # fmt: skip
    return SnapshotSource.of_arena(arena, Step(step))


def load(folder: Path, state: ProtectedState, patch: Patch) -> ShardsRestored:
    found = Inventory(copies=tuple(local_copies(JOB, folder, NODE)))
    return restore_shards(
        found, state, step=Step(9), seat=Seat(0), node=NODE, servers={}, secret=b"", stages=True,
        patch=patch,
    )  # fmt: skip


def test_a_layers_number_is_the_first_in_its_name() -> None:
    assert layer_of("model/layers.3.mix.0.weight") == ("model/layers.*.mix.0.weight", 3)
    assert layer_of("model/3.0.weight") == ("model/*.0.weight", 3)
    assert layer_of("model/head.weight") is None
    assert layer_of("optimizer/state/model/layers.3.weight/exp_avg") is None
    assert layers_in(["model/b.4.x", "model/b.2.x", "model/b.2.y", "model/head"]) == [2, 4]


def test_a_lost_stage_is_the_mean_of_its_neighbours_layer_by_layer(tmp_path: Path) -> None:
    captured(tmp_path, 0, Layers(range(2), 0.0), 9)
    captured(tmp_path, 2, Layers(range(4, 6), 100.0), 9)
    whole = Layers(range(6), -1.0)
    state, optimizer = whole.state()

    def make(
        state: ProtectedState, left: Mapping[Seat, SnapshotSource], opened: ExitStack
    ) -> Older:
        mean = MeanStage(
            left[Seat(0)], left[Seat(2)], state.targets().wanted({}, None), norms=(3.0, 1.0), stage=1
        )  # fmt: skip
        assert (mean.first, mean.end) == (2, 4)
        return Older(sources=[mean], smalls=[mean.small(left[Seat(0)].head.small)])

    done = load(tmp_path, state, Patch(generation=Generation(1), layouts=2, make=make))
    values = [weight[0, 0].item() for weight in whole.weights]
    # Layer 2 of layers 0 and 4, layer 3 of 1 and 5, nine tenths of them the first ones'.
    assert values == [0.0, 1.0, pytest.approx(10.4), pytest.approx(11.4), 104.0, 105.0]
    assert done.patched == 2 * 4 * (WIDTH * WIDTH + WIDTH)
    with_moments = [p in optimizer.state for p in whole.parameters()]
    assert with_moments == [True] * 4 + [False] * 4 + [True] * 4


@pytest.mark.parametrize(
    ("end", "held", "made_of"),
    [(0, range(3, 6), {1: 3, 2: 4}), (5, range(3), {3: 0, 4: 1})],
    ids=["first", "last"],
)
def test_a_lost_outer_stage_is_its_neighbour_and_the_copies_it_kept(
    tmp_path: Path, end: int, held: range, made_of: dict[int, int]
) -> None:
    """The outermost layer is of a shape of its own, and was in the optimizer's second group."""
    names = [f"model/layers.{end}.{part}" for part in ("weight", "bias")]
    shapes = [(2, WIDTH), (2,)]
    copies = {copied_name(n, 1): torch.full(s, 7.0) for n, s in zip(names, shapes, strict=True)}
    captured(tmp_path, 1, Layers(held, 10.0), 9, copies)
    whole = Layers(range(6), -1.0)
    whole.layers[str(end)] = nn.Linear(WIDTH, 2)
    state, optimizer = whole.state()

    def make(
        state: ProtectedState, left: Mapping[Seat, SnapshotSource], opened: ExitStack
    ) -> Older:
        one, other = (None, left[Seat(1)]) if end == 0 else (left[Seat(1)], None)
        wanted = state.targets().wanted({}, None)
        mean = MeanStage(one, other, wanted, norms=(None, None), stage=0)
        assert (mean.copied, mean.made_of) == ({end}, made_of)
        small = left[Seat(1)].head.small
        (name,) = small["optimizers"]
        group = small["optimizers"][name]["groups"][0]
        two = {"groups": [group, {**group, "params": []}], "other": {}}
        made = mean.small({"optimizers": {name: two}})["optimizers"][name]["groups"]
        assert sorted(made[1]["params"]) == sorted(names)
        assert len(made[0]["params"]) == 4
        both = {"groups": [{**group, "params": [n for g in made for n in g["params"]]}]}
        return Older(
            sources=[mean], smalls=[{**small, "optimizers": {name: {**both, "other": {}}}}]
        )

    load(tmp_path, state, Patch(generation=Generation(1), layouts=1, make=make))
    weights: dict[int, Any] = {int(i): layer.weight for i, layer in whole.layers.items()}
    values = {i: weight[0, 0].item() for i, weight in weights.items()}
    expected = {i: 10.0 + i for i in held} | {i: 10.0 + of for i, of in made_of.items()}
    assert values == expected | {end: 7.0}
    fresh = [*made_of, end]
    for i, weight in weights.items():
        assert (weight in optimizer.state) == (i not in fresh), "moments begin anew"


def test_a_lost_stage_from_an_older_copy_and_nothing_else_from_it(tmp_path: Path) -> None:
    older = tmp_path / "older"
    older.mkdir()
    captured(tmp_path, 0, Layers(range(2), 0.0), 9)
    captured(tmp_path, 2, Layers(range(4, 6), 100.0), 9)
    # Layers moved meanwhile: the old copy has one that is left.
    captured(older, 1, Layers(range(1, 4), 50.0), 3)
    whole = Layers(range(6), -1.0)
    state, optimizer = whole.state()

    def make(state: ProtectedState, left: object, opened: ExitStack) -> Older:
        old = source(opened, older, 1, 3)
        return Older(sources=[old], smalls=[old.head.small])

    patch = Patch(generation=Generation(1), layouts=2, make=make)
    load(tmp_path, state, patch)
    values = [weight[0, 0].item() for weight in whole.weights]
    assert values == [0.0, 1.0, 52.0, 53.0, 104.0, 105.0]
    assert all(p in optimizer.state for p in whole.parameters()), "moments are of the old step"
    # Less than was agreed to be left is not made up for.
    with pytest.raises(Incomplete, match="more than agreed"):
        load(tmp_path, state, Patch(generation=Generation(1), layouts=3, make=make))


def test_a_lost_stage_from_a_checkpoint_and_nothing_else_from_it(tmp_path: Path) -> None:
    captured(tmp_path, 0, Layers(range(2), 0.0), 9)
    captured(tmp_path, 2, Layers(range(4, 6), 100.0), 9)
    old = Layers(range(6), 50.0)
    root = str(tmp_path / "saved")
    save(root, 3, model=old, optimizer=torch.optim.AdamW(old.parameters(), lr=0.5))
    taken = Approximation(
        way=Option.STALE_SHARD, step=Step(9), generation=Generation(1), checkpoint=Step(3),
        seats=tuple(map(Seat, range(3))), lost=(Seat(1),), layouts=2,
    )  # fmt: skip
    parts: Any = SimpleNamespace(env=SimpleNamespace(checkpoint_dir=root))
    whole = Layers(range(6), -1.0)
    state, _ = whole.state()
    done = load(tmp_path, state, patch_of(taken, parts, None))
    values = [weight[0, 0].item() for weight in whole.weights]
    assert values == [0.0, 1.0, 52.0, 53.0, 104.0, 105.0]
    assert done.patched == 2 * 4 * (WIDTH * WIDTH + WIDTH)


def test_what_is_damaged_is_not_made_up_for_without_a_word(tmp_path: Path) -> None:
    older = tmp_path / "older"
    older.mkdir()
    path = captured(tmp_path, 0, Layers(range(2), 0.0), 9)
    captured(older, 1, Layers(range(4), 50.0), 3)
    with ensure_arena(path, ProtectedState(model=nn.Linear(1, 1)).layout()) as arena:
        arena.data_to_mend(arena.find(Step(9)))[40] ^= 1

    def make(state: ProtectedState, left: object, opened: ExitStack) -> Older:
        old = source(opened, older, 1, 3)
        return Older(sources=[old], smalls=[old.head.small])

    state, _ = Layers(range(4), -1.0).state()
    with pytest.raises(IntegrityError, match="digest"):
        load(tmp_path, state, Patch(generation=Generation(1), layouts=1, make=make))


def test_layers_of_another_shape_are_refused(tmp_path: Path) -> None:
    captured(tmp_path, 0, Layers(range(2), 0.0), 9)
    captured(tmp_path, 2, Layers(range(4, 6), 100.0, odd=True), 9)
    wanted = Layers(range(2, 4), 0.0).state()[0].targets().wanted({}, None)
    with ExitStack() as opened:
        sides = source(opened, tmp_path, 0, 9), source(opened, tmp_path, 2, 9)
        with pytest.raises(UsageError, match=r"the one behind it has nothing like model/layers\.2"):
            MeanStage(*sides, wanted, norms=(1.0, 1.0), stage=1)


def test_stages_of_other_lengths_are_lined_up(tmp_path: Path) -> None:
    captured(tmp_path, 0, Layers(range(1), 0.0), 9)
    captured(tmp_path, 2, Layers(range(4, 8), 100.0), 9)
    stage = Layers(range(1, 4), 0.0)
    wanted = stage.state()[0].targets().wanted({}, None)
    with ExitStack() as opened:
        sides = source(opened, tmp_path, 0, 9), source(opened, tmp_path, 2, 9)
        mean = MeanStage(*sides, wanted, norms=(None, 1.0), stage=1)
        assert (mean.first, mean.end) == (1, 4)
        read = {}
        for box in mean.entries():
            out = bytearray(4 * box.box.elements)
            mean.read(box.name, box.box, memoryview(out))
            read[box.name] = torch.frombuffer(out, dtype=torch.float32)[0].item()
    # An even mean, as one norm is not known: of layer 0 and of layers 4, 5 and 6.
    assert [read[f"model/layers.{i}.weight"] for i in (1, 2, 3)] == [52.0, 52.5, 53.0]


def test_older_small_state_counts_for_what_no_other_tells_of() -> None:
    def small(lr: float, *params: str) -> dict[str, object]:
        groups = [{"params": list(params), "hyper": lr}]
        return {"optimizers": {"o": {"groups": groups, "other": dict.fromkeys(params, lr)}}}

    made = with_older({Seat(2): small(0.1, "a")}, [small(0.7, "a", "b")])
    assert made[Seat(2)] == small(0.1, "a")
    assert made[Seat(3)] == small(0.7, "b")


def test_an_averaged_layer_takes_steps_that_are_a_tenth_longer() -> None:
    plain, raised = Layers(range(3), 1.0), Layers(range(3), 1.0)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.5) for m in (plain, raised)]
    layers = set[int]()
    raise_rate(raised, optimizers[1], layers)
    layers.add(1)  # known only later
    for model, optimizer in zip((plain, raised), optimizers, strict=True):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    for i in (0, 2):
        assert torch.equal(plain.weights[i], raised.weights[i])
    short, long = plain.weights[1] - 2.0, raised.weights[1] - 2.0
    assert torch.allclose(long, 1.1 * short)
