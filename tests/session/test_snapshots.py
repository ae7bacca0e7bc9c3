"""Shares of several members in one process: no job, real arenas, real state."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ftkit.checkpoint import pages
from ftkit.checkpoint.arena import Arena, arena_path
from ftkit.checkpoint.copies import local_copies
from ftkit.checkpoint.layout import StateLayout
from ftkit.checkpoint.load import small_of_seats, small_of_stages
from ftkit.checkpoint.provision import ensure_arena
from ftkit.checkpoint.slabs import Pin
from ftkit.core.errors import CapacityError, IntegrityError
from ftkit.core.ids import Generation, JobId, MemberId, NodeId, Seat, Step
from ftkit.core.inventory import Inventory
from ftkit.core.world import Member, World
from ftkit.session import snapshots
from ftkit.session.snapshots import Snapshots
from ftkit.session.stateful import Place, Places
from tests.checkpoint.helpers import Training, assert_same

JOB, NODE = JobId("t"), NodeId(0)
#: Small chunks, so that a small state has something to share.
CHUNK_BYTES = 1024
STALL_S = 0.05


class Rig:
    """One member: its state, and an agent that makes arenas in a folder."""

    def __init__(self, folder: Path, seat: int, *, seed: int = 1, every: int = 0) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.folder, self.seat = folder, seat
        self.training = Training(seed=seed)
        env = SimpleNamespace(
            job=JOB,
            seat=seat,
            member=seat,
            node=NODE,
            secret="",
            shm_dir=folder,
            max_stall_s=STALL_S,
            checkpoint_every=every,
            checkpoint_dir="",
        )
        trace = SimpleNamespace(event=lambda kind, **fields: self.events.append((kind, fields)))
        control = SimpleNamespace(arena=self.make, stores={}, saves=None)
        parts: Any = SimpleNamespace(env=env, control=control, trace=trace)
        self.snapshots = Snapshots(
            model=[self.training.model],
            optimizer=[self.training.optimizer],
            scheduler=self.training.scheduler,
            extra={},
            parts=parts,
        )

    def make(self, layout: object, replicas: int, *, gpu_node: int | None = None) -> str:
        path = arena_path(JOB, Seat(self.seat), self.folder)
        ensure_arena(
            path, StateLayout.from_json(layout), replicas=replicas, chunk_bytes=CHUNK_BYTES
        ).close()
        return str(path)

    def step(self, number: int, world: World) -> None:
        self.training.forward_backward(number)
        self.snapshots.gate()
        self.training.update()
        self.snapshots.begin(Step(number), world)

    def restore(
        self, step: int, world: World, *, wait: Callable[[float], None] = lambda seconds: None
    ) -> None:
        membership: Any = SimpleNamespace(
            active=True, generation=world.generation, wait_changed=wait
        )
        self.snapshots.restore(Step(step), world, membership, admitted=True)


def world_of(generation: int, *seats: int) -> World:
    return World(
        generation=Generation(generation),
        members=tuple(
            Member(member=MemberId(s), seat=Seat(s), node=NODE, host="h", port=1) for s in seats
        ),
    )


def due(folder: Path) -> list[tuple[int, Step]]:
    """(seat, step) of the parts that are marked to go to disk."""
    return sorted((c.seat, c.step) for c in local_copies(JOB, folder, NODE, pinned=Pin.DUE))


def complete(folder: Path) -> set[Step]:
    return set(Inventory(copies=tuple(local_copies(JOB, folder, NODE))).complete())


@pytest.fixture
def three(tmp_path):
    """Three members at step 3, each holding a third of it."""
    rigs, world = [Rig(tmp_path, seat) for seat in range(3)], world_of(1, 0, 1, 2)
    for number in (1, 2, 3):
        for rig in rigs:
            rig.step(number, world)
    for rig in rigs:
        rig.snapshots.gate()
    yield rigs
    for rig in rigs:
        rig.snapshots.close()


def lose(rig: Rig) -> None:
    """With its node: nothing of it is left."""
    rig.snapshots.close()
    arena_path(JOB, Seat(rig.seat), rig.folder).unlink()


def test_three_thirds_make_a_whole_and_a_newcomer_reads_each_once(three, tmp_path):
    assert complete(tmp_path) == {1, 2, 3}
    held = [rig.events[-1][1]["bytes"] for rig in three]
    assert max(held) - min(held) <= 2 * CHUNK_BYTES
    late = Rig(tmp_path, 3, seed=9)
    late.snapshots.look_ahead(world_of(1, 0, 1, 2))
    late.restore(3, world_of(2, 0, 1, 2, 3))
    assert_same(late.snapshots._state, three[0].snapshots._state)
    ((_, told),) = [e for e in late.events if e[0] == "restore"]
    assert told["source"].count("this node") == 3
    assert late.snapshots.layout == three[0].snapshots.layout
    late.snapshots.close()


@pytest.mark.parametrize("looks", [6, 10])
def test_a_newcomer_waits_longer_for_its_peers_than_it_takes_to_find_one_that_hangs(
    three, monkeypatch, looks
):
    """Else it would die of a peer that stopped in its capture, and be taken for another fault."""
    waited: list[float] = []
    monkeypatch.setattr(snapshots, "time", SimpleNamespace(monotonic=lambda: sum(waited)))
    for rig in three:
        rig.training.forward_backward(4)
        rig.training.update()

    def wait(seconds: float) -> None:
        waited.append(STALL_S / 4)
        if len(waited) == looks:
            for rig in three:
                rig.snapshots.begin(Step(4), world_of(1, 0, 1, 2))
                rig.snapshots.gate()

    late, world = Rig(three[0].folder, 3, seed=9), world_of(2, 0, 1, 2, 3)
    if looks / 4 < snapshots.PATIENCE_WITH_PEERS:
        late.restore(4, world, wait=wait)
        assert_same(late.snapshots._state, three[0].snapshots._state)
    else:
        with pytest.raises(IntegrityError, match="step 4 is not complete"):
            late.restore(4, world, wait=wait)
    late.snapshots.close()


@pytest.mark.parametrize("left", [(0, 2), (1,)])
def test_the_survivors_take_the_same_step_again_and_it_is_whole_without_the_dead(
    three, tmp_path, left
):
    for rig in three:
        if rig.seat not in left:
            lose(rig)
    assert complete(tmp_path) == set(), "every step had a part with the dead"
    world = world_of(2, *left)
    for seat in left:
        three[seat].snapshots.begin(Step(3), world)
    for seat in left:
        three[seat].snapshots.gate()
    assert complete(tmp_path) == {3}
    late = Rig(tmp_path, 5, seed=9)
    late.restore(3, world)
    assert_same(late.snapshots._state, three[left[0]].snapshots._state)
    late.snapshots.close()


def test_a_damaged_part_is_struck_and_the_step_is_complete_no_more(three, tmp_path):
    path = arena_path(JOB, Seat(1), tmp_path)
    with Arena.open(path) as arena, path.open("r+b") as file:
        slab = next(i for i, s in enumerate(arena.slabs()) if s is not None and s.step == 3)
        file.seek(arena.geometry.slab_at(slab) + arena.geometry.data_at + 7)
        file.write(b"\xa5\x5a")
    late = Rig(tmp_path, 5, seed=9)
    with pytest.raises(IntegrityError, match="step 3 is not complete"):
        late.restore(3, world_of(2, 0, 1, 2))
    assert complete(tmp_path) == {1, 2}, "whoever chooses next chooses an older step"
    late.restore(2, world_of(3, 0, 1, 2))
    late.snapshots.close()


def test_no_memory_for_a_larger_share_costs_the_snapshot_and_not_the_training(
    three, tmp_path, monkeypatch
):
    def full(*_: object) -> None:
        raise CapacityError("shared memory is full")

    for rig in three[1:]:
        lose(rig)
    monkeypatch.setattr(pages, "_fallocate", full)
    alone = world_of(2, 0)
    three[0].snapshots.begin(Step(3), alone)
    three[0].step(4, alone)
    three[0].snapshots.gate()
    assert [kind for kind, _ in three[0].events][-2:] == ["snapshot-failed"] * 2
    assert complete(tmp_path) == set()
    monkeypatch.undo()
    three[0].step(5, alone)
    three[0].snapshots.gate()
    assert complete(tmp_path) == {5}


def test_what_was_restored_is_kept_until_something_newer_is_whole(three, tmp_path):
    """All died when step 4 was sealed by some: its parts must not cost the step restored."""
    world = world_of(1, 0, 1, 2)
    three[0].step(4, world)
    three[0].snapshots.gate()
    assert complete(tmp_path) == {2, 3}
    for rig in three:
        rig.snapshots.close()
    again, new = [Rig(tmp_path, seat, seed=7) for seat in range(3)], world_of(2, 0, 1, 2)
    for rig in again:
        rig.restore(3, new)
    again[0].step(4, new)
    again[0].snapshots.gate()
    assert 3 in complete(tmp_path), "the others have not sealed step 4 yet"
    for rig in again:
        rig.snapshots.close()


def test_a_rank_that_finds_all_slabs_pinned_skips_alone_and_nobody_is_misled(tmp_path):
    rigs, world = [Rig(tmp_path, seat, every=2) for seat in range(2)], world_of(1, 0, 1)

    def step(number: int) -> None:
        for rig in rigs:
            rig.step(number, world)
        for rig in rigs:
            rig.snapshots.gate()

    def pin(*, on: bool) -> None:
        with Arena.open(arena_path(JOB, Seat(1), tmp_path), writable=True) as arena:
            for sealed in arena.snapshots():
                arena.pin(sealed, Pin.PARITY, on=on)

    for number in (1, 2, 3):
        step(number)
    assert due(tmp_path) == [(0, 2), (1, 2)]
    pin(on=True)
    step(4)
    assert [kind for kind, _ in rigs[1].events][-1] == "snapshot-skipped"
    assert complete(tmp_path) == {2, 3}, "half of step 4 is no step 4"
    assert due(tmp_path) == [(0, 4), (1, 2)], "what was due is due still, there is nothing newer"
    pin(on=False)
    for number in (5, 6):
        step(number)
    assert {5, 6} <= complete(tmp_path)
    assert due(tmp_path) == [(0, 6), (1, 6)], "the next one that is due is so everywhere"
    for rig in rigs:
        rig.snapshots.close()


def test_a_state_that_outgrows_the_arena_gets_a_larger_one_and_loses_no_snapshot(three, tmp_path):
    world = world_of(1, 0, 1, 2)
    for rig in three:
        weight = next(rig.training.model.parameters())
        rig.training.optimizer.state[weight]["average"] = torch.ones(50_000)
        rig.step(4, world)
    for rig in three:
        rig.snapshots.gate()
    assert complete(tmp_path) == {2, 3, 4}
    late = Rig(tmp_path, 3, seed=9)
    late.restore(4, world_of(2, 0, 1, 2, 3))
    weight = next(late.training.model.parameters())
    assert late.training.optimizer.state[weight]["average"].numel() == 50_000
    late.snapshots.close()


@pytest.mark.parametrize(
    ("gpu", "address"),
    [
        ({"pci_domain_id": 1, "pci_bus_id": 0x3B, "pci_device_id": 0}, "0001:3b:00.0"),
        ({"name": "of a torch that does not tell"}, None),
    ],
)
def test_the_gpu_of_a_rank_is_looked_up_by_its_address(
    gpu: dict[str, Any], address: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[str]()
    monkeypatch.setattr(snapshots, "node_of_gpu", lambda given: asked.append(given))
    assert snapshots._gpu_node() is None, "CUDA is not in use"
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(**gpu))
    snapshots._gpu_node()
    assert asked == ([] if address is None else [address])


def place(step: int) -> Place:
    return Place(Step(step), 0, step * 2 - 1, f"{step}", step)


def test_the_place_kept_is_that_of_the_step_though_more_was_read(three, tmp_path):
    world, survivors = world_of(1, 0, 1, 2), world_of(2, 0, 2)
    for rig in three:
        rig.snapshots.keep_places(places := Places())
        places.note(place(4))
        rig.step(4, world)
        places.note(place(5))  # an attempt that is rolled back
        rig.snapshots.gate()
    lose(three[1])
    for rig in (three[0], three[2]):
        rig.snapshots.begin(Step(4), survivors)
        rig.snapshots.gate()
    late = Rig(tmp_path, 1)
    late.snapshots.keep_places(taken := Places())
    late.restore(4, survivors)
    assert taken.newest(Step(9)) == place(4)
    late.snapshots.close()


def test_a_model_that_is_built_anew_keeps_the_place_too():
    parts: Any = SimpleNamespace(env=None, control=None, trace=SimpleNamespace(event=print))
    kept = Snapshots(model=(), optimizer=(), scheduler=None, extra={}, parts=parts)
    kept.keep_places(places := Places())
    places.note(place(7))
    places.step = Step(7)
    for _ in range(2):
        model = torch.nn.Linear(2, 2)
        kept.adopt(model, torch.optim.SGD(model.parameters()), None)
        small = kept._state.small()
        assert small["optional"] == {"loader": {"places": [place(7).to_json()]}}
        # Whoever saved it, the first seat's counts: all read the same stream.
        assert small_of_seats({Seat(1): small, Seat(0): small}, Seat(2)) == small
        assert small_of_stages({Seat(0): small}, Seat(0))["optional"] == small["optional"]
