"""A model with everything that makes state hard, and a training step that is a pure function."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ftkit.checkpoint.arena import Arena
from ftkit.checkpoint.layout import StateLayout
from ftkit.checkpoint.ports import BoxSource
from ftkit.checkpoint.provision import ensure_arena
from ftkit.checkpoint.slabs import SLABS, Pin
from ftkit.checkpoint.sources import SnapshotSource
from ftkit.checkpoint.state import ProtectedState
from ftkit.core.errors import IntegrityError
from ftkit.core.ids import Generation, Seat, Step


class Training:
    """BatchNorm, a strided (channels-last) weight, a hidden buffer, AdamW and a schedule."""

    def __init__(self, *, seed: int = 0, width: int = 8) -> None:
        generator = torch.random.fork_rng()
        with generator:
            torch.manual_seed(seed)
            self.model = nn.Sequential(
                nn.Conv2d(3, width, 3),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.Flatten(),
                nn.Linear(width * 36, 5),
            )
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model.register_buffer("hidden", torch.zeros(3), persistent=False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.scheduler = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, [2, 4], gamma=0.5)
        self.state = ProtectedState(
            model=self.model, optimizer=self.optimizer, scheduler=self.scheduler
        )

    def forward_backward(self, step: int) -> None:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(4, 3, 8, 8, generator=generator)
        self.model(x).square().mean().backward()
        self.model.get_buffer("hidden").add_(1)

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()

    def train(self, step: int) -> None:
        self.forward_backward(step)
        self.update()


def contents(state: ProtectedState) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    picture = state.picture()
    return {item.name: item.tensor.detach().clone() for item in picture.live}, state.small()


def assert_same(left: ProtectedState, right: ProtectedState) -> None:
    (tensors, small), (others, other_small) = contents(left), contents(right)
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == others[name].dtype, name
        assert torch.equal(tensor, others[name]), name
    assert small == other_small


def make_arena(
    path: Path, layout: StateLayout, *, chunk_bytes: int = 1024, slabs: int = SLABS
) -> Arena:
    return ensure_arena(path, layout, chunk_bytes=chunk_bytes, slabs=slabs)


def pattern(step: int, count: int) -> bytes:
    """The reference: what the data of a snapshot of `step` must be."""
    return bytes((step * 31 + i * 7) % 251 for i in range(251)) * (count // 251 + 1)


def write_pattern(
    arena: Arena, layout: StateLayout, step: int, generation: int = 1, pins: Sequence[Pin] = ()
) -> None:
    writer = arena.start(Step(step), Generation(generation), layout, pins=pins)
    writer.reserve()
    writer.data[:] = np.frombuffer(
        pattern(step, layout.total_bytes)[: layout.total_bytes], dtype=np.uint8
    )
    writer.digest(range(len(writer.table)))
    writer.seal(b'{"step":%d}' % step)


def snapshot_of_seats(
    arenas: Mapping[Seat, Arena], step: Step, *, seat: Seat
) -> tuple[list[BoxSource], dict[Seat, SnapshotSource]]:
    """A world's snapshot as sources for one seat, its own part first, and the same by seat.

    Seats whose part is lost are not among them.
    """
    found = dict[Seat, SnapshotSource]()
    for other in sorted(arenas, key=lambda s: (s != seat, s)):
        with suppress(IntegrityError):
            found[other] = SnapshotSource.of_arena(arenas[other], step)
    return list(found.values()), found


def data_of(arena: Arena, step: int) -> bytes:
    """The data of this arena's part of a step, checked."""
    head = arena.head(arena.find(Step(step)))
    return b"".join(bytes(block) for block in arena.blocks(head))
