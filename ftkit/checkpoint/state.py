"""ProtectedState: all that must come back for training to go on as if nothing had happened."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.optim import Optimizer

from ftkit.checkpoint.box import TensorBox
from ftkit.checkpoint.chunks import scatter
from ftkit.checkpoint.cut_walk import CutOptimizer, CutWalk, of_rows
from ftkit.checkpoint.layout import SMALL_BYTES, StateLayout
from ftkit.checkpoint.plain import encode
from ftkit.checkpoint.shards import boxes_of, is_dtensor
from ftkit.checkpoint.targets import Targets
from ftkit.checkpoint.walk import (
    Live,
    OptimizerWalk,
    live_boxes,
    module_tensors,
    named_parameters,
    named_tensors,
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
        self._optional: dict[str, Stateful] = {}
        self._beside: Mapping[str, torch.Tensor] = {}
        for name, value in named.items():
            if "/" in name:
                raise UsageError(f"{name!r} cannot name protected state: it contains '/'")
            match value:
                case nn.Module():
                    self._modules[name] = value
                case Optimizer():
                    walk = CutWalk if isinstance(value, CutOptimizer) else OptimizerWalk
                    self._optimizers.append(walk(name, value, self._name_of))
                case Stateful():
                    self._others[name] = value
                case _:
                    raise UsageError(
                        f"{name} is a {type(value).__name__} without state_dict() and "
                        "load_state_dict()"
                    )
        self._names: dict[int, str] = {}
        self._parameters: dict[tuple[str, tuple[int, ...]], tuple[int, TensorBox]] | None = None
        self._layout: StateLayout | None = None
        self._signatures: list[TensorBox] = []
        # What the last walk found, good for as long as the watch holds.
        self._watch: Watch | None = None
        self._lazy: tuple[Live, ...] = ()
        self._lazy_signatures: list[TensorBox] = []
        self._early: list[Live] = []
        self._fixed: tuple[StateLayout, tuple[Live, ...]] | None = None

    def also(self, name: str, value: Stateful) -> None:
        """Keep the state of `value` with the small state, from here on.

        Unlike what was given at first it may be missing: a snapshot without it is loaded, and
        `value` left as it is; one with it is loaded where nobody asks for it. No tensors.
        """
        self._optional[name] = value

    def beside(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Capture these with the rest from here on: copies of what others hold, by name.

        They are never loaded, change in the optimizer's step alone, and stay the same objects.
        """
        self._beside = tensors
        self._watch = None

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
        # What must be captured at once is kept together at the end.
        early = self._early + [
            item for name, tensor in loose.items() for item in _inner(name, tensor)
        ]
        early.sort(key=lambda item: item.key)
        # The same tuple as long as nothing moved: whoever reads it need not look again.
        live = (*self._lazy, *early) if early else self._lazy
        signatures = self._lazy_signatures + [item.signature for item in early]
        if self._layout is None or signatures != self._signatures:
            self._layout = StateLayout.of_boxes(signatures, small_bytes=self._small_bytes)
            self._signatures = signatures
        self._fixed = None if loose else (self._layout, live)
        return Picture(self._layout, live, small)

    def look_again(self) -> None:
        """Walk anew with the next picture: another part of the state is this rank's now."""
        self._watch = None

    def tensors(self) -> list[torch.Tensor]:
        """The live tensors, in the order of the layout. Raises as `picture`."""
        return [item.tensor for item in self.picture().live]

    def of_modules(self, modules: Iterable[nn.Module]) -> list[Live]:
        """What is protected of some modules: parameters, buffers, optimizer state. Raises as `picture`."""
        parts = {id(t) for m in modules for t in (*m.parameters(), *m.buffers())}
        names = {
            full
            for key, module in self._modules.items()
            for full, tensor, _ in named_tensors(key, module)
            if id(tensor) in parts
        }
        own = tuple(f"{walk.name}/state/{name}/" for walk in self._optimizers for name in names)
        live = self.picture().live
        return [item for item in live if item.name in names or item.name.startswith(own)]

    def whole(self, *, steady: bool = False) -> dict[str, torch.Tensor]:
        """Parameters and buffers, by name, whatever part of them is captured here.

        `steady` leaves out buffers, which may change outside the optimizer's step.
        """
        return {
            full: tensor
            for name, module in self._modules.items()
            for full, tensor, is_buffer in named_tensors(name, module)
            if not (steady and is_buffer)
        }

    def room(self) -> StateLayout:
        """A layout as large as any rank's, however the pieces of optimizers are divided."""
        layout = self.picture().layout
        boxes = [
            box for walk in self._optimizers if isinstance(walk, CutWalk) for box in walk.room()
        ]
        cut = {box.name for box in boxes}
        others = [e.signature for e in layout.entries if e.name not in cut]
        return StateLayout.of_boxes([*boxes, *others], small_bytes=self._small_bytes)

    def parameter_name(self, parameter: torch.Tensor) -> str:
        """The full name of a protected parameter. KeyError for another tensor."""
        name = self._name_of(parameter)
        if name is None:
            raise KeyError(f"a parameter of shape {tuple(parameter.shape)} is not protected")
        return name

    def optimizer_name(self, optimizer: Optimizer) -> str:
        """What a protected optimizer is called in the names of its state."""
        return next(walk.name for walk in self._optimizers if walk.optimizer is optimizer)

    def small(self) -> dict[str, Any]:
        """The small state, JSON-safe. Raises as `picture`."""
        value: dict[str, Any] = json.loads(self.picture().small)
        return value

    def load(
        self, layout: StateLayout, blocks: Iterable[memoryview | bytes], small: Mapping[str, Any]
    ) -> None:
        """Make the live state what a snapshot holds, bit for bit; as `load_by`.

        Args:
          layout: the snapshot's.
          blocks: its data in order, cut anywhere (`[data]` will do).
          small: its small state.
        """
        self.load_by(layout, lambda targets: scatter(layout, blocks, targets), small)

    def load_by(
        self,
        layout: StateLayout,
        fill: Callable[[Sequence[memoryview]], None],
        small: Mapping[str, Any],
    ) -> None:
        """Make the live state what a snapshot holds, bit for bit.

        Blocks while it copies. Parameters and buffers are written in place; optimizer state
        that a fresh optimizer lacks is created, and what the snapshot lacks is removed. When it
        raises after `fill` was called, the state is partly loaded: load again from another
        copy before going on.

        Args:
          layout: the snapshot's.
          fill: writes its data, given a buffer of bytes for each entry of the layout: a live
            tensor's own memory where that can be.
          small: its small state.

        Raises:
          StateChanged: the model or an optimizer is not the one the snapshot is of, or this
            rank holds other boxes of it (then `load_state` can help). Nothing was changed.
          IntegrityError: the data is not what the layout says, or whatever `fill` raises.
        """
        targets = self.targets()
        self._check_boxes(layout)
        targets.check_small(small)
        tensors = targets.tensors({e.name: (e.dtype, e.global_shape) for e in layout.entries})
        goals = _match(layout, tensors)
        hosts = [
            goal
            if goal.is_contiguous() and goal.device.type == "cpu"
            else torch.empty(goal.shape, dtype=goal.dtype)
            for goal in goals
        ]
        fill([bytes_of(host) for host in hosts])
        with torch.no_grad():
            for goal, host in zip(goals, hosts, strict=True):
                if goal is not host:
                    goal.copy_(host)
        targets.finish(tensors, small)

    def targets(self) -> Targets:
        """Where a load into the state as it is now goes; for `load.load_state`."""
        return Targets(self._modules, self._optimizers, self._others, self._optional)

    def _walk(self) -> None:
        """Find every live tensor anew."""
        self._watch = None
        live = [
            tensor
            for name, module in self._modules.items()
            for tensor in module_tensors(name, module)
        ]
        self._check_parameters(live)
        if cut := [walk for walk in self._optimizers if isinstance(walk, CutWalk)]:
            live = list(of_rows(live, cut))
        for optimizer in self._optimizers:
            live += optimizer.live()
        for name, tensor in self._beside.items():
            live += live_boxes(name, tensor, early=False)
        live.sort(key=lambda item: item.key)
        self._lazy = tuple(item for item in live if not item.early)
        self._lazy_signatures = [item.signature for item in self._lazy]
        self._early = [item for item in live if item.early]
        self._watch = Watch(
            [unwrap(module) for module in self._modules.values()],
            [walk.watched for walk in self._optimizers],
            [item.tensor for item in live],
        )

    def _small(self, loose: dict[str, torch.Tensor], unchanged: bool) -> dict[str, object]:
        small: dict[str, object] = {
            "optimizers": {walk.name: walk.small(loose, unchanged) for walk in self._optimizers},
            "others": {
                name: encode(other.state_dict(), name, loose)
                for name, other in self._others.items()
            },
        }
        if self._optional:
            small["optional"] = {
                name: encode(value.state_dict(), name, loose)
                for name, value in self._optional.items()
            }
        return small

    def _name_of(self, parameter: torch.Tensor) -> str | None:
        name = self._names.get(id(parameter))
        if name is None:
            self._names = {
                id(parameter): name
                for key, module in self._modules.items()
                for name, parameter in named_parameters(key, module)
            }
            name = self._names.get(id(parameter))
        return name

    def _check_parameters(self, live: Iterable[Live]) -> None:
        found = {
            item.key: (item.tensor.data_ptr(), item.signature) for item in live if not item.early
        }
        if self._parameters is None:
            self._names.clear()
            self._parameters = found
        if found == self._parameters:
            return
        before = self._parameters
        changed = sorted(k for k in before.keys() | found.keys() if before.get(k) != found.get(k))
        what = [
            f"{key[0]} was {'added' if key not in before else 'removed'}"
            if key not in before or key not in found
            else f"{key[0]} moved or changed from {before[key][1]} to {found[key][1]}"
            for key in changed[:5]
        ]
        raise StateChanged(
            f"{len(changed)} parameters changed after protect(): {'; '.join(what)}. Call "
            "protect() again after changing the model"
        )

    def _check_boxes(self, layout: StateLayout) -> None:
        mine = [
            item.signature
            for name, module in self._modules.items()
            for item in module_tensors(name, module)
        ]
        prefixes = tuple(f"{name}/" for name in self._modules)
        stored = [e.signature for e in layout.entries if e.name.startswith(prefixes)]
        differences = StateLayout.of_boxes(stored).differences(StateLayout.of_boxes(mine))
        if differences:
            raise StateChanged(
                f"the snapshot is of another model: {'; '.join(differences)} (snapshot, then "
                "live). Build the model as the snapshot's job did; when only its sharding "
                "differs, load_state loads it"
            )


def _match(layout: StateLayout, tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """The memory each entry goes to. StateChanged when this rank holds other boxes."""
    views = {
        (name, box): view
        for name, tensor in tensors.items()
        for box, view in boxes_of(name, tensor)
    }
    keys = [(e.name, e.box) for e in layout.entries]
    if views.keys() != set(keys):
        name, box = min(views.keys() ^ set(keys))
        where = "this rank" if (name, box) in views else "the snapshot"
        raise StateChanged(
            f"only {where} has {box} of {name}: the state was sharded otherwise. load_state "
            "loads it"
        )
    return [views[key] for key in keys]


def _inner(name: str, tensor: torch.Tensor) -> Iterable[Live]:
    """A tensor found inside some value."""
    if is_dtensor(tensor):
        raise UsageError(
            f"{name} is a DTensor inside a value, and nothing says how to shard it when it comes "
            "back: protect the module that owns it instead"
        )
    return live_boxes(name, tensor, early=True)


def _numbered(name: str, value: object) -> dict[str, object]:
    if isinstance(value, Sequence):
        return {f"{name}.{i}": item for i, item in enumerate(value)}
    return {name: value}


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor as bytes, writable, no copy."""
    # Not reshape(-1): a single element may have any stride and still be contiguous.
    flat = tensor.detach().as_strided((tensor.numel(),), (1,))
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(bytearray())
