"""Builder: makes the sharded model of each world, by the script's own `build(mesh)`.

A world that changed has another mesh, and FSDP2 cannot cut a model anew: it is built again, in
the same process, and loads its shards from snapshots. Whatever `build` draws at random is drawn
from the same seed each time, so that the first values do not depend on the world either.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from ftkit.core.errors import UsageError
from ftkit.core.world import World
from ftkit.recovery.data_cursor import derive
from ftkit.session.consistency import Consistency, refusal
from ftkit.session.zero import ZeroOptimizer

#: Gives (model, optimizer) or (model, optimizer, scheduler), sharded over the mesh it is given.
Build = Callable[[Any], Sequence[Any]]


class Builder:
    """The sharded model of the present world. Used by the training thread."""

    def __init__(
        self,
        build: Build,
        *,
        shards: int | None,
        consistency: str,
        device: str | None,
        stages: bool = False,
    ) -> None:
        """Take note; nothing is built before the step loop.

        Raises:
          UsageError: `shards` or `consistency` is none that we know.
        """
        if shards is not None and stages:
            raise UsageError("a pipeline's stages are not cut again: give stages= or shards=")
        if shards is not None and shards < 2:
            raise UsageError(f"shards={shards}: a model is cut over 2 ranks or more")
        self._consistency = Consistency.of(consistency)
        if stages and self._consistency is Consistency.SCALED:
            raise UsageError(
                "every stage of a pipeline plays all micro-batches, so there is nothing to resize: "
                'consistency="scaled" is for models that are not cut into stages'
            )
        self._build, self._shards, self._device = build, shards, device
        self.stages = stages
        """Whether each rank holds other layers, rather than a part of each."""
        self._mesh: Any = None
        self.model: nn.Module | None = None
        self.optimizer: Optimizer | None = None
        self.scheduler: object | None = None

    def make(self, world: World) -> None:
        """Build for `world`, in which this rank is. Blocks; what was built before is let go.

        Raises:
          UsageError: what came back is no model with its optimizer, or cannot keep the promise.
          Exception: whatever the script's `build` raises.
        """
        self.let_go()
        from torch.distributed.device_mesh import init_device_mesh

        device = self._device or ("cuda" if torch.cuda.is_available() else "cpu")
        shape = mesh_shape(world.size, self._shards)
        names = ("stage",) if self.stages else ("replicate", "shard")[-len(shape) :]
        self._mesh = init_device_mesh(device, shape, mesh_dim_names=names)
        with _seeded(derive("build")):
            made = self._build(self._mesh)
        if not isinstance(made, (tuple, list)) or len(made) not in (2, 3):
            raise UsageError("build(mesh) must return (model, optimizer[, scheduler])")
        model, optimizer = made[:2]
        if not isinstance(model, nn.Module) or not isinstance(optimizer, Optimizer):
            raise UsageError(
                f"build(mesh) must return a module and its optimizer, not a {type(model).__name__} "
                f"and a {type(optimizer).__name__}"
            )
        if isinstance(optimizer, ZeroOptimizer):
            raise UsageError(
                "build(mesh) must return an optimizer of the parts that this rank holds: a ZeroOptimizer "
                "cuts the state of a model that every rank holds whole, for protect(model=, optimizer=)"
            )
        if reason := refusal(self._consistency, [model], [optimizer], sharded=True):
            raise UsageError(reason)
        self.model, self.optimizer = model, optimizer
        self.scheduler = made[2] if len(made) == 3 else None

    def let_go(self) -> None:
        """Give back what memory the model holds, even where the script still has it by name."""
        if self.optimizer is not None:
            for group in self.optimizer.param_groups:
                for param in group["params"]:
                    param.grad = None
            self.optimizer.state.clear()
        if self.model is not None:
            from torch.distributed.fsdp import FSDPModule

            for part in self.model.modules():
                if isinstance(part, FSDPModule):
                    # A pass that was cut short may have left whole parameters.
                    with suppress(RuntimeError, AssertionError):
                        part.reshard()
        self.model = self.optimizer = self.scheduler = None
        mesh, self._mesh = self._mesh, None
        if mesh is not None and mesh.ndim > 1:
            for group in mesh.get_all_groups():
                if group is not dist.group.WORLD:
                    dist.destroy_process_group(group)


def mesh_shape(size: int, shards: int | None) -> tuple[int, ...]:
    """The mesh of a world: one dimension, or (replicas, shards) when a model is cut over fewer.

    Where `shards` does not divide the world, more do: a copy never has to fit fewer ranks.
    """
    if shards is None:
        return (size,)
    cut = next((n for n in range(min(shards, size), size + 1) if size % n == 0), size)
    return size // cut, cut


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draw from `seed` meanwhile, and go on as before afterwards."""
    states = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng():
        torch.manual_seed(seed >> 1)
        random.seed(seed)
        numpy.random.seed(seed & 0xFFFFFFFF)
        try:
            yield
        finally:
            random.setstate(states[0])
            numpy.random.set_state(states[1])
