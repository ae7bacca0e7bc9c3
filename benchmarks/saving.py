"""Ways to save the state of every step: ftkit's and its peers', behind one small face.

One process trains; a way is told when the optimizer is about to change the state, and when it
has. Its peers write files where ftkit writes shared memory: that is what each of them has to
offer for a save at every step, and what their times are worth is compared knowing that. ::

    ftkit                 Capture: begin after the step, gate before the next, digests of all
    dcp                   async_save as it is: a new stager each time
    dcp-kept              the same, with one DefaultStager kept by the caller
    dcp-shm               the same, its memory shared
    dcp-process           a process writes, the copy runs beside training, in shared memory
    torch_checkpointing   its default, with its lock round the optimizer's step; O_DIRECT is off,
                          for its unaligned writes fail on ext4
    torch.save            one file, no fsync
"""

import argparse
import os
import shutil
import time
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import (
    AsyncCheckpointerType,
    AsyncSaveResponse,
    async_save,
)

from benchmarks.children import free_port, gloo_environment
from benchmarks.figures import parser
from benchmarks.peers import peers_folder
from ftkit.checkpoint.arena import Arena
from ftkit.checkpoint.capture import Capture
from ftkit.checkpoint.provision import ensure_arena
from ftkit.checkpoint.slabs import SLABS
from ftkit.checkpoint.state import ProtectedState
from ftkit.core.ids import Generation, Step
from ftkit.launch.workload.gpt import GPT, GPTConfig, next_byte_loss

#: Bytes of state for a parameter: itself and both moments, float32.
BYTES_PER_PARAMETER = 12


class Loop:
    """A GPT that trains on noise; its state is of about so many bytes."""

    def __init__(self, state_bytes: int, *, fused: bool = True, positions: int = 256) -> None:
        width = 768 if state_bytes >= 128 << 20 else 64
        block = 12 * width * width * BYTES_PER_PARAMETER
        config = GPTConfig(
            width=width, depth=max(1, round(state_bytes / block)), heads=width // 64,
            context=positions,
        )  # fmt: skip
        self.model = GPT(config, seed=0)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=fused)
        generator = torch.Generator().manual_seed(0)
        self._bytes = torch.randint(256, (1, positions + 1), generator=generator)
        self.forward_backward()
        self.update()
        self.state = ProtectedState(model=self.model, optimizer=self.optimizer)
        self.total_bytes = self.state.layout().total_bytes
        # Made once: the tensors stay where they are, and peers are not to pay for their names.
        self.state_dict: dict[str, Any] = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def forward_backward(self) -> None:
        next_byte_loss(self.model(self._bytes[:, :-1]), self._bytes[:, 1:]).backward()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


class Way:
    """A way to save. This one does not: training as it would be."""

    def before(self) -> None:
        """The optimizer is about to change the state."""

    def wait(self) -> None:
        """The save before is to be over before another can begin. Not counted as blocked."""

    def after(self, number: int) -> None:
        """It has: save."""

    def tidy(self, number: int) -> None:
        """Make room. Not timed."""

    def drain(self) -> None:
        """All that was begun is done."""


class Captured(Way):
    """ftkit's memory tier, as a rank uses it."""

    def __init__(self, loop: Loop, arena: Arena) -> None:
        self.arena = arena
        self.capture = Capture(arena, loop.state)

    def before(self) -> None:
        self.capture.gate()

    def after(self, number: int) -> None:
        self.capture.begin(Step(self.capture.snapshots + 1), Generation(1))

    def drain(self) -> None:
        self.capture.gate()


class _Files(Way):
    """Files in a folder, of which the last two are kept."""

    def __init__(self, loop: Loop, folder: Path) -> None:
        self.state = loop.state_dict
        self._folder = folder
        self._count = 0
        folder.mkdir()

    def path(self) -> Path:
        self._count += 1
        return self._folder / str(self._count)

    def tidy(self, number: int) -> None:
        old = self._folder / str(self._count - 2)
        shutil.rmtree(old, ignore_errors=True)
        old.unlink(missing_ok=True)


class TorchSave(_Files):
    """`torch.save` while everything waits."""

    def after(self, number: int) -> None:
        torch.save(self.state, self.path())


class Dcp(_Files):
    """`dcp.async_save`."""

    def __init__(
        self,
        loop: Loop,
        folder: Path,
        stager: DefaultStager | None = None,
        kind: AsyncCheckpointerType = AsyncCheckpointerType.THREAD,
    ) -> None:
        super().__init__(loop, folder)
        self._stager, self._kind = stager, kind
        self._staged: Future[Any] | None = None
        self._written: Future[Any] | None = None

    def before(self) -> None:
        # Staged beside training, the state must not change before that is done.
        if self._staged is not None:
            self._staged.result()

    def wait(self) -> None:
        if self._written is not None:
            self._written.result()

    def after(self, number: int) -> None:
        saved = async_save(
            self.state,
            checkpoint_id=self.path(),
            async_stager=self._stager,
            async_checkpointer_type=self._kind,
            no_dist=True,
        )
        if isinstance(saved, AsyncSaveResponse):
            self._staged, self._written = saved.staging_completion, saved.upload_completion
        else:
            self._written = saved

    def drain(self) -> None:
        self.before()
        self.wait()


class TorchCheckpointing(_Files):
    """`torch_checkpointing`, its manager kept."""

    def __init__(self, loop: Loop, folder: Path, stack: ExitStack) -> None:
        super().__init__(loop, folder)
        from torch_checkpointing import CheckpointManager
        from torch_checkpointing.config import AsyncCheckpointSaverConfig
        from torch_checkpointing.staging import CheckpointStagerConfig
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        # Pinned memory and non-blocking copies want an accelerator.
        staging = CheckpointStagerConfig(use_pinned_memory=False, use_non_blocking_copy=False)
        self._manager = CheckpointManager(
            CheckpointManager.Config(
                storage_config=LocalFileSystemStorageConfig(use_direct_io=False),
                save=AsyncCheckpointSaverConfig(staging_config=staging),
            )
        )
        stack.callback(self._manager.close)
        self._manager.prewarm_staging({"state": self.state})
        self._lock: Any = None
        self._written: Any = None

    def before(self) -> None:
        self._lock = self._manager.lock()
        self._lock.__enter__()

    def wait(self) -> None:
        self._lock.__exit__(None, None, None)
        self.drain()

    def after(self, number: int) -> None:
        self._written = self._manager.save(str(self.path()), {"state": self.state})

    def drain(self) -> None:
        if self._written is not None:
            self._written.result()


def kept_stager(*, shared: bool = False, beside: bool = False) -> DefaultStager:
    """A stager that keeps its memory; as much of it as works without an accelerator."""
    return DefaultStager(
        StagingOptions(
            use_pinned_memory=False,
            use_shared_memory=shared,
            use_async_staging=beside,
            use_non_blocking_copy=False,
        )
    )


def warm_up(loop: Loop, ways: Iterable[Way]) -> None:
    """One save of each: processes are started and memory is there before anything is timed."""
    for way in ways:
        play(loop, way, 0)


def be_quiet() -> None:
    """DCP warns, on threads of its own, that there is no process group; none is meant to be."""
    warnings.filterwarnings("ignore", module=r"torch\.distributed")
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")


@dataclass(frozen=True, slots=True)
class Sample:
    """One step, in seconds."""

    step_s: float
    """All of it."""
    blocked_s: float
    """Of which the training thread stood still for the save."""
    waited_s: float
    """And for the save before, so that they do not pile up."""


def play(loop: Loop, way: Way, steps: int, warm: int = 1) -> list[Sample]:
    """Train some steps and save each; the first ones are not counted."""
    clock, found = time.perf_counter, list[Sample]()
    for number in range(-warm, steps):
        begun = clock()
        loop.forward_backward()
        ready = clock()
        way.before()
        still = clock()
        loop.update()
        done = clock()
        way.wait()
        free = clock()
        way.after(number)
        end = clock()
        way.tidy(number)
        if number >= 0:
            found.append(Sample(end - begun, still - ready + end - free, free - done))
    way.drain()
    return found


@contextmanager
def group_of_one() -> Iterator[None]:
    """The process group without which DCP's writing process does not start."""
    os.environ |= gloo_environment(0, 1, free_port())
    dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def captured(loop: Loop, path: Path, *, slabs: int = SLABS) -> Iterator[Captured]:
    """Ftkit's way, with an arena at `path` that is removed afterwards."""
    try:
        with ensure_arena(path, loop.state.layout(), slabs=slabs) as arena:
            # As a rank does when it maps its arena: pages now, not in the first capture.
            arena.reserve(loop.total_bytes)
            way = Captured(loop, arena)
            with way.capture:
                yield way
    finally:
        path.unlink(missing_ok=True)


def broken_snapshot(way: Captured, loop: Loop) -> str:
    """What is wrong with the newest snapshot, which is to be the live state; "" when nothing."""
    sealed = way.arena.newest_good()
    if sealed is None or sealed.step != way.capture.snapshots:
        return f"the arena's newest good snapshot is {sealed}, {way.capture.snapshots} were sealed"
    data = way.arena.data(sealed)
    try:
        for entry, item in zip(
            way.arena.head(sealed).layout.entries, loop.state.picture().live, strict=True
        ):
            live = item.tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
            if data[entry.at : entry.at + entry.bytes] != live.data:
                return f"the snapshot's {entry.name} is not what is live"
    finally:
        data.release()
    return ""


def saving_parser(description: str | None, *, rounds: int) -> argparse.ArgumentParser:
    """The options of a benchmark that saves the state of a `Loop`; `rounds` is its default."""
    made = parser(description)
    made.add_argument("--mib", type=int, help="size of the state in MiB (1024; quick: 128)")
    made.add_argument("--steps", type=int, help="saves of each way in a round (3; quick: 2)")
    made.add_argument("--rounds", type=int, help=f"rounds ({rounds}; quick: 1)")
    made.add_argument("--plain", action="store_true", help="AdamW that is not fused")
    made.add_argument("--positions", type=int, default=96, help="bytes in a step's batch")
    made.add_argument(
        "--peers", type=Path, default=peers_folder(), help="where torch_checkpointing is installed"
    )
    made.add_argument("--without", action="store_true", help="leave torch_checkpointing out")
    return made
