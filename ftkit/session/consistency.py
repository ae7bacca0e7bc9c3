"""Consistency: what is promised of the result whatever happens to the job, and what that rules out."""

from collections.abc import Iterable
from enum import StrEnum
from typing import Self

import torch
from torch import nn
from torch.optim import Optimizer

from ftkit.core.errors import UsageError

#: Optimizers of torch whose step treats each element by itself, so that it does not matter where a
#: parameter is cut.
_ELEMENTWISE = (
    torch.optim.Adadelta, torch.optim.Adagrad, torch.optim.Adam, torch.optim.Adamax,
    torch.optim.AdamW, torch.optim.ASGD, torch.optim.NAdam, torch.optim.RAdam,
    torch.optim.RMSprop, torch.optim.Rprop, torch.optim.SGD,
)  # fmt: skip


class Consistency(StrEnum):
    """What is promised of the result."""

    BITWISE = "bitwise"
    """The bits of the undisturbed run."""
    SCALED = "scaled"
    """The same samples with the same random numbers and weights, in micro-batches of any size: equal
    to the undisturbed run but for rounding."""
    BEST_EFFORT = "best_effort"
    """The same samples with the same weights; sums may be rounded otherwise."""

    @classmethod
    def of(cls, name: str) -> Self:
        """The mode called `name`. UsageError when there is none."""
        try:
            return cls(name)
        except ValueError:
            known = ", ".join(cls)
            raise UsageError(f"consistency={name!r} is not known; choose {known}") from None


def refusal(
    mode: Consistency,
    models: Iterable[nn.Module],
    optimizers: Iterable[Optimizer],
    *,
    sharded: bool,
) -> str:
    """Why `mode` cannot be promised of these, and what to do; empty if it can.

    `sharded`: each rank's optimizer sees a part of every parameter.
    """
    modules, reasons = list(models), list[str]()
    for optimizer in optimizers if sharded else ():
        if mode is Consistency.BITWISE:
            reasons += [r for m in modules if (r := breaks_bits(m, optimizer))]
        elif mode is Consistency.SCALED and (reason := _looks_around(optimizer)):
            reasons.append(reason)
    if mode is Consistency.SCALED:
        reasons += filter(None, map(_mixes_samples, modules))
    if not reasons:
        return ""
    other = "best_effort" if sharded else "bitwise"
    accept = "accept other bits with" if other == "best_effort" else "keep slots whole with"
    return f'{reasons[0]}; or {accept} protect(..., consistency="{other}")'


def cut_refusal(models: Iterable[nn.Module], optimizers: Iterable[Optimizer]) -> str:
    """Why these cannot be the inside of a ZeroOptimizer; empty if they can."""
    modules = list(models)
    reasons = (breaks_bits(module, optimizer) for optimizer in optimizers for module in modules)
    return next(filter(None, reasons), "")


def _looks_around(optimizer: Optimizer) -> str:
    kind = type(optimizer)
    if kind.__module__.startswith("torch.optim") and not isinstance(optimizer, _ELEMENTWISE):
        return (
            f"{kind.__name__} looks at more than one element at a time, so its result depends on "
            "where a parameter is cut: use an optimizer that does not, such as AdamW"
        )
    return ""


def _mixes_samples(model: nn.Module) -> str:
    """Why a sample's gradient depends on those it is played with; empty if it does not."""
    for name, part in model.named_modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.training:
            return (
                f"{name or 'the model'} is a {type(part).__name__}, which takes the mean over a "
                "micro-batch, whose size changes: use GroupNorm or LayerNorm"
            )
    return ""


def breaks_bits(model: nn.Module, optimizer: Optimizer) -> str:
    """Why the result would depend on how the model is cut, and what to do; empty if it does not."""
    kind = type(optimizer)
    if reason := _looks_around(optimizer):
        return reason
    on_cuda = any(p.is_cuda for p in model.parameters())
    if not on_cuda and any(group.get("fused") for group in optimizer.param_groups):
        return (
            f"{kind.__name__}(fused=True) on the CPU rounds the last elements of a shard otherwise "
            "than the rest, so its result depends on where a parameter is cut: leave fused out"
        )
    if on_cuda and not torch.are_deterministic_algorithms_enabled():
        return (
            "CUDA kernels may add in any order: call torch.use_deterministic_algorithms(True) "
            "before ftkit.init()"
        )
    return ""
