"""ProtectedState: all that must come back for training to go on as if nothing had happened."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.optim import Optimizer

from ftkit.checkpoint.chunks import scatter
from ftkit.checkpoint.layout import SMALL_BYTES, StateLayout
from ftkit.checkpoint.plain import decode, encode
from ftkit.checkpoint.walk import (
    Live,
    OptimizerWalk,
    check_kind,
    module_tensors,
    unwrap,
)
from ftkit.checkpoint.watch import Watch
from ftkit.core.errors import StateChanged, UsageError


@runtime_checkable
class Stateful(Protocol):
    """Anything with the usual two methods: schedulers, scalers, samplers, loaders."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> object: ...


@dataclass(frozen=True, slots=True)
class Picture:
    """The state at one moment: live tensors in layout order, and small state encoded."""

    layout: StateLayout
    live: tuple[Live, ...]
    small: bytes
    """JSON, UTF-8."""


class ProtectedState:
    """Modules, optimizers, schedulers and other stateful objects, as one.

    Captures parameters, all buffers (non-persistent ones too: a replayed step must see them),
    optimizer state by parameter name, hyperparameters, and the `state_dict()` of the rest as
    plain values (`plain.encode`). Loading is in place: parameters stay the same objects.

    Not thread-safe: call it from the training thread, between steps.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer] = (),
        scheduler: Stateful | Sequence[Stateful] = (),
        small_bytes: int = SMALL_BYTES,
        **extra: Stateful,
    ) -> None:
        """Take note of the objects; they stay the caller's.

        Args:
          model: the module trained, inside DDP or not.
          optimizer: one or several.
          scheduler: one or several.
          small_bytes: room for the small state, as JSON.
          extra: anything else with state_dict and load_state_dict. Modules (EMA weights) and
            optimizers among them are treated as such.

        Raises:
          UsageError: an object is of no kind we can protect.
        """
        named: dict[str, object] = {"model": model}
        named |= _numbered("optimizer", optimizer) | _numbered("scheduler", scheduler)
        named |= extra
        self._small_bytes = small_bytes
        self._modules: dict[str, nn.Module] = {}
        self._optimizers: list[OptimizerWalk] = []
        self._others: dict[str, Stateful] = {}
        for name, value in named.items():
            if "/" in name:
                raise UsageError(f"{name!r} cannot name protected state: it contains '/'")
            match value:
                case nn.Module():
                    self._modules[name] = value
                case Optimizer():
                    self._optimizers.append(OptimizerWalk(name, value, self._name_of))
                case Stateful():
                    self._others[name] = value
                case _:
                    raise UsageError(
                        f"{name} is a {type(value).__name__} without state_dict() and "
                        "load_state_dict()"
                    )
        self._names: dict[int, str] = {}
        self._parameters: dict[str, tuple[int, str, tuple[int, ...]]] | None = None
        self._layout: StateLayout | None = None
        self._signatures: list[tuple[str, str, tuple[int, ...]]] = []
        # What the last walk found, good for as long as the watch holds.
        self._watch: Watch | None = None
        self._lazy: tuple[Live, ...] = ()
        self._lazy_signatures: list[tuple[str, str, tuple[int, ...]]] = []
        self._early: list[Live] = []
        self._fixed: tuple[StateLayout, tuple[Live, ...]] | None = None

    def layout(self) -> StateLayout:
        """Accept the state as it is now, and say how it is laid out.

        Optimizer state appears with the first step, so the layout does too; `picture` follows
        that by itself. Call `layout` again after changing the model on purpose.
        """
        self._parameters = None
        self._watch = None
        return self.picture().layout

    def picture(self) -> Picture:
        """The state now. Copies no tensor; a millisecond or so per thousand of them.

        Raises:
          StateChanged: a parameter was added, removed, moved or reshaped since `layout`.
          UsageError: something cannot be captured; the message names it.
        """
        unchanged = self._watch is not None and self._watch.holds()
        if not unchanged:
            self._walk()
        loose = dict[str, torch.Tensor]()
        small = json.dumps(self._small(loose, unchanged), separators=(",", ":")).encode()
        if unchanged and not loose and self._fixed is not None:
            return Picture(*self._fixed, small)
        for name, tensor in loose.items():
            check_kind(name, tensor)
        # What must be captured at once is kept together at the end.
        early = self._early + [Live(name, tensor, early=True) for name, tensor in loose.items()]
        early.sort(key=lambda item: item.name)
        # The same tuple as long as nothing moved: whoever reads it need not look again.
        live = (*self._lazy, *early) if early else self._lazy
        signatures = self._lazy_signatures + [item.signature for item in early]
        if self._layout is None or signatures != self._signatures:
            self._layout = StateLayout.of(signatures, small_bytes=self._small_bytes)
            self._signatures = signatures
        self._fixed = None if loose else (self._layout, live)
        return Picture(self._layout, live, small)

    def tensors(self) -> list[torch.Tensor]:
        """The live tensors, in the order of the layout. Raises as `picture`."""
        return [item.tensor for item in self.picture().live]

    def small(self) -> dict[str, Any]:
        """The small state, JSON-safe. Raises as `picture`."""
        value: dict[str, Any] = json.loads(self.picture().small)
        return value

    def load(
        self, layout: StateLayout, blocks: Iterable[memoryview | bytes], small: Mapping[str, Any]
    ) -> None:
        """Make the live state what a snapshot holds, bit for bit.

        Blocks while it copies. Parameters and buffers are written in place; optimizer state
        that a fresh optimizer lacks is created, and what the snapshot lacks is removed. When it
        raises after the blocks were begun, the state is partly loaded: load again from
        another copy before going on.

        Args:
          layout: the snapshot's.
          blocks: its data in order, cut anywhere (`[data]` will do).
          small: its small state.

        Raises:
          StateChanged: the model or an optimizer is not the one the snapshot is of. Nothing
            was changed.
          IntegrityError: the blocks are not what the layout says, or whatever they raise.
        """
        self._check_load(layout, small)
        mine = {
            item.name: item.tensor
            for name, module in self._modules.items()
            for item in module_tensors(name, module)
        }
        owners = [(walk, walk.parameters()) for walk in self._optimizers]

        def goal_of(name: str, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
            if name in mine:
                return mine[name].detach()
            kind: torch.dtype = getattr(torch, dtype)
            for walk, parameters in owners:
                if walk.owns(name):
                    return walk.prepare(name, kind, shape, parameters)
            return torch.empty(shape, dtype=kind)

        goals = [goal_of(*entry.signature) for entry in layout.entries]
        hosts = [
            goal
            if goal.is_contiguous() and goal.device.type == "cpu"
            else torch.empty(goal.shape, dtype=goal.dtype)
            for goal in goals
        ]
        scatter(layout, blocks, [_bytes_of(host) for host in hosts])
        with torch.no_grad():
            for goal, host in zip(goals, hosts, strict=True):
                if goal is not host:
                    goal.copy_(host)
            loaded = {e.name: goal for e, goal in zip(layout.entries, goals, strict=True)}
            for walk in self._optimizers:
                own = {name: t for name, t in loaded.items() if walk.owns(name)}
                walk.load(small["optimizers"][walk.name], own, loaded.__getitem__)
        for name, other in self._others.items():
            other.load_state_dict(decode(small["others"][name], loaded.__getitem__))

    def _walk(self) -> None:
        """Find every live tensor anew."""
        self._watch = None
        live = [
            tensor
            for name, module in self._modules.items()
            for tensor in module_tensors(name, module)
        ]
        self._check_parameters(live)
        for optimizer in self._optimizers:
            live += optimizer.tensors()
        live.sort(key=lambda item: item.name)
        self._lazy = tuple(item for item in live if not item.early)
        self._lazy_signatures = [item.signature for item in self._lazy]
        self._early = [item for item in live if item.early]
        self._watch = Watch(
            [unwrap(module) for module in self._modules.values()],
            [walk.optimizer for walk in self._optimizers],
            [item.tensor for item in live],
        )

    def _small(self, loose: dict[str, torch.Tensor], unchanged: bool) -> dict[str, object]:
        return {
            "optimizers": {walk.name: walk.small(loose, unchanged) for walk in self._optimizers},
            "others": {
                name: encode(other.state_dict(), name, loose)
                for name, other in self._others.items()
            },
        }

    def _name_of(self, parameter: torch.Tensor) -> str | None:
        name = self._names.get(id(parameter))
        if name is None:
            self._names = {
                id(p): item.name
                for key, module in self._modules.items()
                for p, item in zip(
                    unwrap(module).parameters(), module_tensors(key, module), strict=False
                )
            }
            name = self._names.get(id(parameter))
        return name

    def _check_parameters(self, live: Iterable[Live]) -> None:
        found = {
            item.name: (item.tensor.data_ptr(), *item.signature[1:])
            for item in live
            if not item.early
        }
        if self._parameters is None:
            self._names.clear()
            self._parameters = found
        if found == self._parameters:
            return
        before = self._parameters
        changed = sorted(n for n in before.keys() | found.keys() if before.get(n) != found.get(n))
        what = [
            f"{name} was {'added' if name not in before else 'removed'}"
            if name not in before or name not in found
            else f"{name} moved or changed from {before[name][1:]} to {found[name][1:]}"
            for name in changed[:5]
        ]
        raise StateChanged(
            f"{len(changed)} parameters changed after protect(): {'; '.join(what)}. Call "
            "protect() again after changing the model"
        )

    def _check_load(self, layout: StateLayout, small: Mapping[str, Any]) -> None:
        mine = [
            item.signature
            for name, module in self._modules.items()
            for item in module_tensors(name, module)
        ]
        prefixes = tuple(f"{name}/" for name in self._modules)
        stored = [e.signature for e in layout.entries if e.name.startswith(prefixes)]
        differences = StateLayout.of(stored).differences(StateLayout.of(mine))
        if differences:
            raise StateChanged(
                f"the snapshot is of another model: {'; '.join(differences)} (snapshot, then "
                "live). Build the model as the snapshot's job did"
            )
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


def _numbered(name: str, value: object) -> dict[str, object]:
    if isinstance(value, Sequence):
        return {f"{name}.{i}": item for i, item in enumerate(value)}
    return {name: value}


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor as bytes."""
    flat = tensor.detach().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(bytearray())
