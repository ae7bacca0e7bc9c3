"""Shadow: state of a few layers on the rank that is to own them next, kept up to date by replay.

What moves is first a copy, of a sealed snapshot; then, step by step, the gradients that the owner's
optimizer was given. The same optimizer over the same gradients comes to the same bits, and a third or
a quarter of the bytes travel. Nobody has to believe it: before anything is used, its hashes are
compared with the owner's (`hashes`).

ElasWave (arXiv 2510.00606) moves layers without blocking; that the catch-up is by gradients, and
proved, is ours.
"""

from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Self

import torch
import xxhash
from torch import nn
from torch.optim import Optimizer

from ftkit.checkpoint.box import Box, TensorBox
from ftkit.checkpoint.state import ProtectedState, bytes_of
from ftkit.checkpoint.walk import dtype_name
from ftkit.core.errors import ProtocolError, UsageError

Hyper = list[dict[str, Any]]
"""Of each parameter group of an optimizer, all but its parameters."""


@dataclass(frozen=True, slots=True)
class Moving:
    """One tensor that moves."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    device: str
    """"cpu" or "cuda"."""
    group: int
    """Of a parameter that is trained, its group in the optimizer; else -1."""
    early: bool
    """A buffer: no optimizer changes it, and it is sent anew with every step."""

    def to_json(self) -> list[object]:
        return [self.name, self.dtype, list(self.shape), self.device, self.group, self.early]

    @classmethod
    def from_json(cls, value: object) -> Self:
        """Read what `to_json` wrote. Raises ProtocolError on anything else."""
        try:
            fields: Any = value
            name, dtype, shape, device, group, early = fields
            if not isinstance(getattr(torch, dtype), torch.dtype) or device not in ("cpu", "cuda"):
                raise ValueError(dtype, device)
            return cls(str(name), dtype, tuple(map(int, shape)), device, int(group), bool(early))
        except (TypeError, ValueError, AttributeError) as error:
            raise ProtocolError(f"not a tensor that moves: {value!r:.80}") from error

    @property
    def nbytes(self) -> int:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return torch.Size(self.shape).numel() * dtype.itemsize


@dataclass(frozen=True, slots=True)
class Owned:
    """What moves, on the rank that owns it: the live tensors, in the order in which they are sent."""

    moving: tuple[Moving, ...]
    live: tuple[torch.Tensor, ...]

    @classmethod
    def of(cls, state: ProtectedState, modules: Sequence[nn.Module], optimizer: Optimizer) -> Self:
        """All that is protected of some modules.

        Raises:
          UsageError: a tensor of theirs is cut into shards, or what the optimizer keeps of it is
            not made of tensors alone.
        """
        kept = [optimizer.state.get(p, {}) for m in modules for p in m.parameters()]
        if not all(isinstance(v, torch.Tensor) for state in kept for v in state.values()):
            raise UsageError("the optimizer keeps more than tensors of a parameter")
        groups = {id(p): n for n, g in enumerate(optimizer.param_groups) for p in g["params"]}
        moving, live = list[Moving](), list[torch.Tensor]()
        for item in state.of_modules(modules):
            tensor = item.tensor
            if tensor.shape != item.global_shape:
                raise UsageError(f"{item.name} is cut into shards, and cannot move")
            group = groups.get(id(tensor), -1)
            device = tensor.device.type
            moving.append(
                Moving(
                    item.name, dtype_name(tensor), tuple(tensor.shape), device, group, item.early
                )
            )
            live.append(tensor)
        return cls(tuple(moving), tuple(live))

    @property
    def trained(self) -> list[torch.Tensor]:
        """The parameters that an optimizer changes, in order."""
        return [t for m, t in zip(self.moving, self.live, strict=True) if m.group >= 0]

    @property
    def buffers(self) -> list[torch.Tensor]:
        """What is sent anew with every step, in order."""
        return [t for m, t in zip(self.moving, self.live, strict=True) if m.early]


class Shadow:
    """The copy that becomes the next owner's. Used by one thread at a time.

    Also a `BoxSource`, of whatever `keep` has left.
    """

    threads = 1

    def __init__(self, moving: Sequence[Moving], optimizer: Optimizer) -> None:
        """Make room for it; nothing is in it yet.

        Args:
          moving: what moves, in the order of the wire.
          optimizer: of this rank, of the same kind and groups as the owner's. Not changed, and not
            kept alive by what is replayed.

        Raises:
          ProtocolError: the optimizer has no such group.
        """
        self.moving = tuple(moving)
        self.tensors: dict[str, torch.Tensor] = {}
        for m in self.moving:
            made = torch.empty(m.shape, dtype=getattr(torch, m.dtype), device=m.device)
            self.tensors[m.name] = nn.Parameter(made) if m.group >= 0 else made
        self._trained = [m for m in self.moving if m.group >= 0]
        if any(m.group >= len(optimizer.param_groups) for m in self._trained):
            raise ProtocolError(f"the optimizer has {len(optimizer.param_groups)} groups")
        self._twin = twin_of(optimizer)
        for m in self._trained:
            self._twin.param_groups[m.group]["params"].append(self.tensors[m.name])
        self._own = set(self.tensors)

    @property
    def nbytes(self) -> int:
        return sum(m.nbytes for m in self.moving)

    def complete(self) -> None:
        """Its tensors have been filled with those of a snapshot: give the optimizer its part."""
        for m in self._trained:
            mark = f"/state/{m.name}/"
            own = {n.partition(mark)[2]: t for n, t in self.tensors.items() if mark in n}
            if own:
                self._twin.state[self.tensors[m.name]] = own

    def replay(
        self, gradients: Sequence[torch.Tensor | None], hyper: Hyper, *, stepped: bool
    ) -> None:
        """One more step of the owner's.

        Args:
          gradients: of the trained parameters, in order; None where there was none. Kept.
          hyper: of the groups, as they were at that step.
          stepped: whether the optimizer did step.

        Raises:
          Exception: whatever the optimizer does.
        """
        if not stepped:
            return
        for group, values in zip(self._twin.param_groups, hyper, strict=True):
            group.update(values)
        for m, gradient in zip(self._trained, gradients, strict=True):
            self.tensors[m.name].grad = gradient
        # Not the instance's own, which a scheduler has wrapped to count calls.
        type(self._twin).step(self._twin)
        for m in self._trained:
            self.tensors[m.name].grad = None

    def hashes(self) -> dict[str, int]:
        """XXH3-64 of each tensor. Reads all of it."""
        for m in self._trained:
            # Some optimizers replace what they keep, rather than change it.
            for key, value in self._twin.state.get(self.tensors[m.name], {}).items():
                for name in (n for n in self.tensors if n.endswith(f"/state/{m.name}/{key}")):
                    if isinstance(value, torch.Tensor):
                        self.tensors[name] = value
        return {name: hash_of(tensor) for name, tensor in self.tensors.items()}

    def keep(self, proved: Iterable[str]) -> None:
        """Offer these tensors only to whoever loads from here."""
        self._own = set(proved) & set(self.tensors)

    def entries(self) -> Iterator[TensorBox]:
        """See `BoxSource`."""
        for m in self.moving:
            if m.name in self._own:
                yield TensorBox(m.name, m.dtype, m.shape, Box.whole(m.shape))

    def read(self, name: str, box: Box, out: memoryview, /) -> None:
        """See `BoxSource`."""
        part = self.tensors[name].detach()[box.slices].cpu().contiguous()
        out[:] = bytes_of(part)

    def __str__(self) -> str:
        return "what was moved ahead"


def hyper_of(optimizer: Optimizer) -> Hyper:
    """The hyperparameters of all groups, copied."""
    return [
        {key: deepcopy(value) for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]


def hash_of(tensor: torch.Tensor) -> int:
    """XXH3-64 of a dense tensor's bytes, in row-major order."""
    host = tensor.detach().cpu().contiguous()
    return xxhash.xxh3_64_intdigest(bytes_of(host))


def fill(tensor: torch.Tensor, data: memoryview) -> None:
    """Make a tensor of a shadow hold these bytes."""
    host = torch.frombuffer(data, dtype=tensor.dtype) if len(data) else torch.empty(0)
    with torch.no_grad():
        if tensor.numel():
            tensor.copy_(host.view(tensor.shape))


def twin_of(optimizer: Optimizer) -> Optimizer:
    """Another optimizer of the same kind and groups, without parameters, state or hooks."""
    twin: Optimizer = object.__new__(type(optimizer))
    own: Mapping[str, Any] = {k: v for k, v in vars(optimizer).items() if k != "step"}
    vars(twin).update(own)
    twin.state = defaultdict(dict)
    twin.param_groups = [{**values, "params": []} for values in hyper_of(optimizer)]
    for name in own:
        # Hooks of the script look at the optimizer that it knows.
        if name.endswith("_hooks"):
            setattr(twin, name, OrderedDict())
    return twin
