"""A DDP model whose layers sleep: computing as the host of an accelerator sees it."""

import time
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

LAYERS = 6

#: Seconds of a layer.
FORWARD_S, BACKWARD_S = 0.012, 0.024


class Sleep(torch.autograd.Function):
    """Time passes."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight)
        time.sleep(FORWARD_S)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        time.sleep(BACKWARD_S)
        return grad, torch.full_like(weight, 1e-3)


class Sleeping(nn.Module):
    """A layer of 4 MiB of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1 << 20))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return cast("torch.Tensor", Sleep.apply(x, self.weight))


def sleeping() -> DistributedDataParallel:
    """A model, a bucket a layer."""
    net = nn.Sequential(*(Sleeping() for _ in range(LAYERS)))
    return DistributedDataParallel(net, bucket_cap_mb=4, gradient_as_bucket_view=True)


def play(model: nn.Module) -> None:
    """Forward and backward. Gradients are added."""
    model(torch.ones(4, 8, requires_grad=True)).mean().backward()


def waiting_hook(state: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:  # type: ignore[name-defined]
    """A bucket's mean, waited for within the hook: backward stands still meanwhile."""
    grads = bucket.buffer()
    dist.all_reduce(grads)
    done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    done.set_result(grads.div_(dist.get_world_size()))
    return done
