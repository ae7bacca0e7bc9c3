"""Autograd: what the package's functions share: the dtype under autocast, and a backward that is the last.

A function of Python's own is opaque to both. Autocast would cast inside of it, where buffers of what
travels are of the inputs' dtype; and a gradient's gradient would be taken of this rank's operations
alone, without what the others sent: wrong, and silently so.
"""

# autograd.Function has no types.
# mypy: disable-error-code="override,no-untyped-call"

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch

from ftkit.core.errors import UsageError

Tensor = torch.Tensor
Call = TypeVar("Call", bound=Callable[..., Any])


def as_autocast(*tensors: Tensor | None) -> list[Any]:
    """Under autocast, tensors in the dtype in which torch's own operators would take them."""
    kind = next(t.device.type for t in tensors if t is not None)
    if not torch.is_autocast_enabled(kind):
        return list(tensors)
    dtype = torch.get_autocast_dtype(kind)
    return [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]


def uncompiled(call: Call) -> Call:
    """A function that `torch.compile` leaves as it is, with what it calls; its graph ends here.

    The compiler is asked only where it is loaded: to import it takes seconds.
    """
    kept: list[Any] = []

    @wraps(call)
    def plain(*args: Any, **options: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return call(*args, **options)
        if not kept:
            kept.append(torch.compiler.disable(call))
        return kept[0](*args, **options)

    return cast("Call", plain)


def once(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """A function's `backward`, which cannot be differentiated, and which autocast does not change.

    torch's `once_differentiable` lets a second derivative pass as zero where the gradient that comes
    in is a constant.
    """

    @wraps(backward)
    def alone(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):
            found = backward(ctx, grad.detach())
        if not torch.is_grad_enabled():  # without create_graph
            return found
        made_of = (grad, *ctx.saved_tensors)
        return tuple(
            _Last.apply(t.requires_grad_(), *made_of) if isinstance(t, Tensor) else t for t in found
        )

    return alone


class _Last(torch.autograd.Function):
    """A gradient, which refuses to be differentiated by what it was made of."""

    @staticmethod
    def forward(_ctx: Any, made: Tensor, *_made_of: Tensor) -> Tensor:
        return made.view_as(made)

    @staticmethod
    def backward(_ctx: Any, *_: Tensor) -> tuple[Any, ...]:
        raise UsageError(
            "what is split over ranks has no second derivative: what the other ranks sent is in "
            "nobody's graph"
        )
