"""Walking live state: every tensor of modules and optimizers, by a name that survives.

Names are fully qualified and free of wrappers (DDP's "module.", torch.compile's "_orig_mod.").
Optimizer state goes by the name of its parameter, not its index, so that a script may regroup
its parameters and two ranks agree whatever order they were made in.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ftkit.checkpoint.plain import decode, encode
from ftkit.core.errors import StateChanged, UsageError


@dataclass(frozen=True, slots=True)
class Live:
    """One live tensor."""

    name: str
    tensor: torch.Tensor
    early: bool
    """Whether it may change outside the optimizer's step, and so must be captured at once."""

    @property
    def signature(self) -> tuple[str, str, tuple[int, ...]]:
        return self.name, dtype_name(self.tensor), tuple(self.tensor.shape)


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


def module_tensors(name: str, module: nn.Module) -> Iterator[Live]:
    """Parameters, and all buffers with the non-persistent ones, each storage's name once.

    Raises:
      UsageError: a tensor is of a kind that cannot be captured; the message names it.
    """
    for key, parameter in unwrap(module).named_parameters():
        yield _live(f"{name}/{_clean(key)}", parameter, early=False)
    for key, buffer in unwrap(module).named_buffers():
        yield _live(f"{name}/{_clean(key)}", buffer, early=True)


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

    def tensors(self) -> Iterator[Live]:
        """The tensors that are direct values of a parameter's state: moments, step counts."""
        for name, (parameter, _) in self.parameters().items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, torch.Tensor):
                    # They change in step() alone, as the parameters do.
                    yield _live(self._state_name(name, key), value, early=False)

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
        parameters = self.parameters()
        state: dict[str, dict[str, Any]] = {}
        for entry, value in saved.items():
            name, key = self._split(entry)
            state.setdefault(name, {})[key] = value
        for name, rest in small["other"].items():
            state.setdefault(name, {}).update(decode(rest, tensor))
        for name, (parameter, _) in parameters.items():
            if name not in state:
                self.optimizer.state.pop(parameter, None)
                continue
            live = self.optimizer.state[parameter]
            live.clear()
            live.update(state[name])
        for group, stored in zip(self.optimizer.param_groups, small["groups"], strict=True):
            for key, value in decode(stored["hyper"], tensor).items():
                old = group.get(key)
                if isinstance(old, torch.Tensor) and isinstance(value, torch.Tensor):
                    # A tensor learning rate may be part of a captured graph: keep the object.
                    old.copy_(value)
                else:
                    group[key] = value

    def check(self, small: Mapping[str, Any]) -> None:
        """StateChanged when the snapshot's groups hold other parameters than ours."""
        stored = [group["params"] for group in small["groups"]]
        live = [
            [self._parameter_name(p) for p in group["params"]]
            for group in self.optimizer.param_groups
        ]
        if stored != live:
            raise StateChanged(
                f"{self.name} has groups of {[len(g) for g in live]} parameters, the snapshot "
                f"{[len(g) for g in stored]}, or their members differ: build it as the "
                "snapshot's job did"
            )

    def owns(self, entry: str) -> bool:
        """Whether an entry of the layout is a direct state tensor of this optimizer."""
        return entry.startswith(f"{self.name}/state/")

    def prepare(
        self,
        entry: str,
        dtype: torch.dtype,
        shape: tuple[int, ...],
        parameters: Mapping[str, tuple[torch.Tensor, dict[str, Any]]],
    ) -> torch.Tensor:
        """The live tensor to load an entry into, or a new one where the optimizer is fresh.

        Args:
          entry: its name.
          dtype: its dtype.
          shape: its shape.
          parameters: what `parameters` returned.

        Raises:
          StateChanged: no parameter of this optimizer has the entry's name.
        """
        name, key = self._split(entry)
        try:
            parameter, group = parameters[name]
        except KeyError:
            raise StateChanged(
                f"the snapshot has {key!r} of parameter {name!r}, which {self.name} does not train"
            ) from None
        value = self.optimizer.state.get(parameter, {}).get(key)
        if (
            isinstance(value, torch.Tensor)
            and value.dtype == dtype
            and tuple(value.shape) == shape
            and value.layout == torch.strided
        ):
            return value
        if shape == tuple(parameter.shape) and key != "step":
            return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
        # Optimizers keep step counts in host memory unless a kernel reads them.
        in_kernel = bool(group.get("capturable") or group.get("fused"))
        on_device = key != "step" or in_kernel
        return torch.empty(shape, dtype=dtype, device=parameter.device if on_device else "cpu")

    def _state_name(self, parameter: str, key: object) -> str:
        if not isinstance(key, str) or "/" in key:
            raise UsageError(f"{self.name} keeps state under {key!r}; keys must be text without /")
        return f"{self.name}/state/{parameter}/{key}"

    def _split(self, entry: str) -> tuple[str, str]:
        name, _, key = entry.removeprefix(f"{self.name}/state/").rpartition("/")
        return name, key


def _clean(name: str) -> str:
    return name.replace("_orig_mod.", "")


def _live(name: str, tensor: torch.Tensor, *, early: bool) -> Live:
    check_kind(name, tensor)
    return Live(name, tensor.detach() if early else tensor, early)


def check_kind(name: str, tensor: torch.Tensor) -> None:
    """UsageError unless `tensor` is dense memory on a CPU or CUDA device."""
    if _is_dtensor(tensor):
        raise UsageError(f"{name} is a DTensor; only replicated state can be protected so far")
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
        raise UsageError(f"{name} is {tensor.layout}; only dense tensors can be protected")
    if tensor.device.type not in ("cpu", "cuda"):
        raise UsageError(f"{name} is on {tensor.device}; protect() after it has real memory")
    if tensor.is_conj() or tensor.is_neg():
        raise UsageError(f"{name} is a lazy conjugate; store tensor.resolve_conj()")


def _is_dtensor(tensor: torch.Tensor) -> bool:
    """Whether it is a DTensor, without importing what costs 0.9 s at the start of a rank."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)
