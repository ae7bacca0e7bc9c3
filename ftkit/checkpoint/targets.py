"""Targets: where saved tensors go, and what becomes of them once they are there.

Parameters and buffers are written in place. Optimizer state that a fresh optimizer lacks is
made first, placed as its parameter is. Tensors inside other values (a scheduler's, a sampler's)
are read into memory of their own and handed over with the value.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ftkit.checkpoint.box import Box
from ftkit.checkpoint.cut_walk import CutWalk
from ftkit.checkpoint.plain import decode, tensor_names
from ftkit.checkpoint.reshard import Kind
from ftkit.checkpoint.shards import boxes_of
from ftkit.checkpoint.walk import OptimizerWalk, dtype_name, named_tensors
from ftkit.core.errors import IntegrityError, StateChanged


class Targets:
    """One load into live objects: `wanted`, then `tensors`, then `finish`."""

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        optimizers: Sequence[OptimizerWalk],
        others: Mapping[str, Any],
        optional: Mapping[str, Any] = {},
    ) -> None:
        """Look at the objects as they are now; nothing is changed before `finish`."""
        self._optimizers = optimizers
        self._others = others
        self._optional = optional
        self._live = {
            full: tensor
            for name, module in modules.items()
            for full, tensor, _ in named_tensors(name, module)
        }
        self._parameters = {walk.name: walk.parameters() for walk in optimizers}

    def check_small(self, small: Mapping[str, Any]) -> None:
        """StateChanged unless the small state is of the same optimizers and other objects."""
        for part, names in (
            ("optimizers", {walk.name for walk in self._optimizers}),
            ("others", set(self._others)),
        ):
            kept = small.get(part)
            if not isinstance(kept, Mapping) or kept.keys() != names:
                had = sorted(kept) if isinstance(kept, Mapping) else kept
                raise StateChanged(f"the snapshot has {part} {had}, protected are {sorted(names)}")
        for walk in self._optimizers:
            walk.check(small["optimizers"][walk.name])

    def narrow(self, small: Mapping[str, Any]) -> dict[str, Any]:
        """The part of a small state that is of these objects: a stage's, of a whole pipeline's."""
        kept = small.get("optimizers", {})
        parts = {w.name: w.narrow(kept[w.name]) for w in self._optimizers if w.name in kept}
        return {**small, "optimizers": {**kept, **parts}}

    def wanted(self, held: Mapping[str, Kind], small: Mapping[str, Any] | None) -> dict[str, Kind]:
        """The tensors this state can take, by name.

        Args:
          held: what is saved. Optimizer state is wanted where it is saved: what the optimizer
            would hold for a parameter is not known before its first step.
          small: the small state that will be loaded with them. With it goes the tensors inside
            its values, and optimizer state that is not saved is dropped; without, it is
            wanted like parameters are.

        Raises:
          IntegrityError: a tensor inside a value is not saved.
        """
        wanted = {name: _kind(tensor) for name, tensor in self._live.items()}
        for walk in self._optimizers:
            trained = self._parameters[walk.name]
            wanted |= {
                name: kind
                for name, kind in held.items()
                if walk.owns(name) and walk.parameter_of(name) in trained
            }
            if small is None:
                wanted |= {name: _kind(tensor) for name, tensor in walk.named_tensors()}
        for name in tensor_names(small):
            if name not in held:
                raise IntegrityError(
                    f"the small state refers to tensor {name}, which is not saved with it"
                )
            # Whatever it was, a value that is replaced has no shape to keep.
            wanted[name] = held[name]
        return wanted

    def inside_value(self, name: str) -> bool:
        """Whether a saved tensor is part of a small value, and so comes with it or not at all."""
        owner = name.partition("/")[0]
        return owner in self._others or (
            owner in self._parameters and not any(walk.owns(name) for walk in self._optimizers)
        )

    def tensors(self, kinds: Mapping[str, Kind]) -> dict[str, torch.Tensor]:
        """The tensor each name is to be loaded into; DTensors where the live ones are.

        Raises:
          StateChanged: an optimizer does not train the parameter, or cannot say how its state
            would be sharded.
        """
        return {name: self._target(name, *kind) for name, kind in kinds.items()}

    def boxes(self, name: str, tensor: torch.Tensor) -> list[tuple[Box, torch.Tensor]]:
        """The boxes of one of `tensors` that are to be here, each with its memory."""
        for walk in self._optimizers:
            if isinstance(walk, CutWalk) and walk.owns(name):
                return walk.boxes(name, tensor)
        return boxes_of(name, tensor)

    def finish(self, loaded: Mapping[str, torch.Tensor], small: Mapping[str, Any] | None) -> None:
        """Make optimizers and other objects what was saved, their tensors being filled.

        Args:
          loaded: what `tensors` returned, or some of it.
          small: checked small state. Without it, optimizers take the tensors and keep the
            rest; of other objects, those whose value is None stay as they are.
        """
        with torch.no_grad():
            for walk in self._optimizers:
                own = {name: tensor for name, tensor in loaded.items() if walk.owns(name)}
                if small is None:
                    walk.put(own)
                else:
                    walk.load(small["optimizers"][walk.name], own, loaded.__getitem__)
        if small is not None:
            for name, other in self._others.items():
                if small["others"][name] is not None:
                    other.load_state_dict(decode(small["others"][name], loaded.__getitem__))
            kept = small.get("optional", {})
            for name, other in self._optional.items():
                if name in kept:
                    other.load_state_dict(decode(kept[name], loaded.__getitem__))

    def _target(self, name: str, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
        if name in self._live:
            return self._live[name]
        kind: torch.dtype = getattr(torch, dtype)
        for walk in self._optimizers:
            if walk.owns(name):
                return walk.prepare(name, kind, shape, self._parameters[walk.name])
        return torch.empty(shape, dtype=kind)


def _kind(tensor: torch.Tensor) -> Kind:
    return dtype_name(tensor), tuple(tensor.shape)
