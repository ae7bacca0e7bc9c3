"""Walking live state: every tensor of modules and optimizers, by a name that survives.

Names are fully qualified and free of wrappers (DDP's "module.", torch.compile's "_orig_mod.",
activation checkpointing's "_checkpoint_wrapped_module."). A DTensor appears as the boxes of it
that are here.
Optimizer state goes by the name of its parameter, not its index, so that a script may regroup
its parameters and two ranks agree whatever order they were made in.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ftkit.checkpoint.box import Box, TensorBox
from ftkit.checkpoint.plain import decode, encode
from ftkit.checkpoint.shards import boxes_of, fresh_like, is_dtensor, local_of, register_shards
from ftkit.core.errors import StateChanged, UsageError


@dataclass(frozen=True, slots=True)
class Live:
    """One live tensor, or one box of it that this rank holds."""

    name: str
    tensor: torch.Tensor
    """The memory of the box: a plain tensor of the box's shape."""
    early: bool
    """Whether it may change outside the optimizer's step, and so must be captured at once."""
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]

    @property
    def key(self) -> tuple[str, tuple[int, ...]]:
        """What tells it from all others of this rank."""
        return self.name, self.offsets

    @property
    def signature(self) -> TensorBox:
        box = Box(self.offsets, tuple(self.tensor.shape))
        return TensorBox(self.name, dtype_name(self.tensor), self.global_shape, box)


def dtype_name(tensor: torch.Tensor) -> str:
    """The dtype as layouts spell it: "float32"."""
    return str(tensor.dtype).removeprefix("torch.")


def unwrap(module: nn.Module) -> nn.Module:
    """The user's module inside DDP and torch.compile."""
    while True:
        if isinstance(module, DistributedDataParallel):
            module = module.module
        elif isinstance(inner := module.__dict__.get("_modules", {}).get("_orig_mod"), nn.Module):
            module = inner
        else:
            return module


def named_parameters(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Full name and parameter, each parameter once; FSDP2's are its sharded ones."""
    module = unwrap(module)
    register_shards(module)
    for key, parameter in module.named_parameters():
        yield f"{name}/{_clean(key)}", parameter


def named_tensors(name: str, module: nn.Module) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """Full name, tensor, and whether it is a buffer. The non-persistent ones are among them."""
    for full, parameter in named_parameters(name, module):
        yield full, parameter, False
    for key, buffer in unwrap(module).named_buffers():
        yield f"{name}/{_clean(key)}", buffer, True


def module_tensors(name: str, module: nn.Module) -> Iterator[Live]:
    """The boxes of parameters and buffers that are here.

    Raises:
      UsageError: a tensor is of a kind that cannot be captured; the message names it.
    """
    for full, tensor, is_buffer in named_tensors(name, module):
        yield from live_boxes(full, tensor, early=is_buffer)


class OptimizerWalk:
    """One optimizer, its state keyed by parameter name."""

    def __init__(
        self, name: str, optimizer: Optimizer, parameter_name: Callable[[torch.Tensor], str | None]
    ) -> None:
        """Walk `optimizer` as `name`; `parameter_name` tells a parameter's full name."""
        self.name = name
        self.optimizer = optimizer
        self._parameter_name = parameter_name
        self._members: list[list[str | None]] = []
        self._has_other = False

    def parameters(self) -> dict[str, tuple[torch.Tensor, dict[str, Any]]]:
        """Each parameter and its group, by full name. UsageError for one of no module."""
        found = dict[str, tuple[torch.Tensor, dict[str, Any]]]()
        for number, group in enumerate(self.optimizer.param_groups):
            for index, parameter in enumerate(group["params"]):
                name = self._parameter_name(parameter)
                if name is None:
                    raise UsageError(
                        f"parameter {index} of group {number} of {self.name} "
                        f"(shape {tuple(parameter.shape)}) belongs to no protected module: pass "
                        "its module to protect() too"
                    )
                found[name] = parameter, group
        return found

    def named_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors that are direct values of a parameter's state: moments, step counts."""
        for name, (parameter, _) in self.parameters().items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, torch.Tensor):
                    yield self._state_name(name, key), value

    def live(self) -> Iterator[Live]:
        """The boxes of these tensors that are here. They change in step() alone."""
        for name, tensor in self.named_tensors():
            yield from live_boxes(name, tensor, early=False)

    @property
    def watched(self) -> Optimizer:
        """The optimizer in which they are."""
        return self.optimizer

    def small(self, tensors: dict[str, torch.Tensor], unchanged: bool = False) -> dict[str, object]:
        """Hyperparameters, and whatever else the state holds. Nested tensors join `tensors`.

        Args:
          tensors: receives tensors found inside other values, by name.
          unchanged: no parameter and no value of the state was replaced since the last call;
            hyperparameters may have been.
        """
        if not (unchanged and self._members):
            self._members = [
                [self._parameter_name(p) for p in group["params"]]
                for group in self.optimizer.param_groups
            ]
            self._has_other = any(
                not isinstance(value, torch.Tensor)
                for state in self.optimizer.state.values()
                for value in state.values()
            )
        groups = [
            {
                "params": members,
                "hyper": encode(
                    {k: v for k, v in group.items() if k != "params"},
                    f"{self.name}/groups/{number}",
                    tensors,
                ),
            }
            for number, (group, members) in enumerate(
                zip(self.optimizer.param_groups, self._members, strict=True)
            )
        ]
        return {"groups": groups, "other": self._other(tensors) if self._has_other else {}}

    def _other(self, tensors: dict[str, torch.Tensor]) -> dict[str, object]:
        """What a parameter's state holds beside tensors, by the parameter's name."""
        other = dict[str, object]()
        for parameter, state in self.optimizer.state.items():
            name = self._parameter_name(parameter)
            rest = {k: v for k, v in state.items() if not isinstance(v, torch.Tensor)}
            if rest:
                other[str(name)] = encode(rest, f"{self.name}/nested/{name}", tensors)
        return other

    def load(
        self,
        small: Mapping[str, Any],
        saved: Mapping[str, torch.Tensor],
        tensor: Callable[[str], torch.Tensor],
    ) -> None:
        """Make the optimizer what it was, keeping every tensor object that fits.

        Args:
          small: what `small` returned.
          saved: this optimizer's direct tensors by entry name, as `prepare` returned them,
            already filled.
          tensor: gives a nested tensor by name.
        """
        rest = {name: decode(value, tensor) for name, value in small["other"].items()}
        for name, (parameter, _) in self.parameters().items():
            if parameter in self.optimizer.state:
                self.optimizer.state[parameter].clear()
            if name in rest:
                self.optimizer.state[parameter].update(rest[name])
        self.put(saved)
        for parameter in [p for p, state in self.optimizer.state.items() if not state]:
            del self.optimizer.state[parameter]
        for group, stored in zip(self.optimizer.param_groups, self._matched(small), strict=True):
            for key, value in decode(stored["hyper"], tensor).items():
                old = group.get(key)
                if isinstance(old, torch.Tensor) and isinstance(value, torch.Tensor):
                    # A tensor learning rate may be part of a captured graph: keep the object.
                    old.copy_(value)
                else:
                    group[key] = value

    def put(self, saved: Mapping[str, torch.Tensor]) -> None:
        """Make these the state of their parameters, and leave the rest as it is.

        Args:
          saved: tensors by entry name, as `prepare` returned them, already filled.
        """
        entries = [(*self._split(entry), value) for entry, value in saved.items()]
        # In the order of the parameters, as the optimizer itself makes it.
        parameters = self.parameters()
        order = {name: i for i, name in enumerate(parameters)}
        for name, key, value in sorted(entries, key=lambda e: order[e[0]]):
            self.optimizer.state[parameters[name][0]][key] = value

    def check(self, small: Mapping[str, Any]) -> None:
        """StateChanged when the snapshot's groups hold other parameters than ours.

        The order of parameters in a group may differ: what belongs to one goes by its name.
        """
        self._matched(small)

    def _matched(self, small: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """The stored group of each live one."""
        stored = list(small["groups"])
        live = [
            sorted(map(str, map(self._parameter_name, group["params"])))
            for group in self.optimizer.param_groups
        ]
        if [sorted(map(str, group["params"])) for group in stored] != live:
            raise StateChanged(
                f"{self.name} has groups of {[len(g) for g in live]} parameters, the snapshot "
                f"{[len(g['params']) for g in stored]}, or their members differ: build it as the "
                "snapshot's job did"
            )
        return stored

    def narrow(self, small: Mapping[str, Any]) -> dict[str, Any]:
        """The part of a small state that is of this optimizer's parameters, group by group."""
        live = {
            str(self._parameter_name(p)) for g in self.optimizer.param_groups for p in g["params"]
        }
        groups = [
            {**group, "params": [p for p in group["params"] if str(p) in live]}
            for group in small["groups"]
        ]
        other = {name: value for name, value in small["other"].items() if name in live}
        return {**small, "groups": groups, "other": other}

    def owns(self, entry: str) -> bool:
        """Whether an entry of the layout is a direct state tensor of this optimizer."""
        return entry.startswith(f"{self.name}/state/")

    def parameter_of(self, entry: str) -> str:
        """The parameter whose state an entry that this optimizer owns is."""
        return self._split(entry)[0]

    def prepare(
        self,
        entry: str,
        dtype: torch.dtype,
        shape: tuple[int, ...],
        parameters: Mapping[str, tuple[torch.Tensor, dict[str, Any]]],
    ) -> torch.Tensor:
        """The live tensor to load an entry into, or a new one where the optimizer is fresh.

        One as large as its parameter is placed as its parameter is.

        Args:
          entry: its name.
          dtype: its dtype.
          shape: its global shape.
          parameters: what `parameters` returned.

        Raises:
          StateChanged: no parameter of this optimizer has the entry's name, or it cannot be
            told how to shard it.
        """
        key, parameter, group = self._trained(entry, parameters)
        value = self.optimizer.state.get(parameter, {}).get(key)
        if (
            isinstance(value, torch.Tensor)
            and value.dtype == dtype
            and tuple(value.shape) == shape
            and value.layout == torch.strided
        ):
            return value
        if shape == tuple(parameter.shape) and key != "step":
            return fresh_like(parameter, dtype)
        if shape and is_dtensor(parameter):
            raise StateChanged(
                f"{entry} is {list(shape)} and its parameter, a DTensor, {list(parameter.shape)}: "
                f"how {self.name} shards it is not known before it made it. Take one step with "
                "the optimizer before loading"
            )
        return torch.empty(shape, dtype=dtype, device=state_device(key, parameter, group))

    def _trained(
        self, entry: str, parameters: Mapping[str, tuple[torch.Tensor, dict[str, Any]]]
    ) -> tuple[str, torch.Tensor, dict[str, Any]]:
        """What an entry is of its parameter, the parameter, and its group. See `prepare`."""
        name, key = self._split(entry)
        if name not in parameters:
            raise StateChanged(
                f"the snapshot has {key!r} of parameter {name!r}, which {self.name} does not train"
            )
        return key, *parameters[name]

    def _state_name(self, parameter: str, key: object) -> str:
        if not isinstance(key, str) or "/" in key:
            raise UsageError(f"{self.name} keeps state under {key!r}; keys must be text without /")
        return f"{self.name}/state/{parameter}/{key}"

    def _split(self, entry: str) -> tuple[str, str]:
        name, _, key = entry.removeprefix(f"{self.name}/state/").rpartition("/")
        return name, key


def _clean(name: str) -> str:
    for wrapper in ("_orig_mod.", "_checkpoint_wrapped_module."):
        name = name.replace(wrapper, "")
    return name


def state_device(key: str, parameter: torch.Tensor, group: Mapping[str, Any]) -> torch.device:
    """Where an optimizer keeps `key`: step counts in host memory, unless a kernel reads them."""
    in_kernel = bool(group.get("capturable") or group.get("fused"))
    return parameter.device if key != "step" or in_kernel else torch.device("cpu")


def live_boxes(name: str, tensor: torch.Tensor, *, early: bool) -> Iterator[Live]:
    """The boxes of a tensor that are here; UsageError when it cannot be captured."""
    check_kind(name, local_of(tensor))
    for box, view in boxes_of(name, tensor):
        memory = view.detach() if early else view
        yield Live(name, memory, early, tuple(tensor.shape), box.offsets)


def check_kind(name: str, tensor: torch.Tensor) -> None:
    """UsageError unless `tensor` is dense memory of its own on a CPU or CUDA device."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
        raise UsageError(f"{name} is {tensor.layout}; only dense tensors can be protected")
    if tensor.device.type not in ("cpu", "cuda"):
        raise UsageError(f"{name} is on {tensor.device}; protect() after it has real memory")
    if tensor.is_conj() or tensor.is_neg():
        raise UsageError(f"{name} is a lazy conjugate; store tensor.resolve_conj()")
    if any(
        step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True)
    ):
        raise UsageError(
            f"{name} is expanded: its elements share memory, so that nothing could be loaded into "
            "it; store tensor.contiguous()"
        )
