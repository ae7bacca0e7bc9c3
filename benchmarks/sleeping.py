"""Computing that sleeps, as the host of an accelerator sees it; and a DDP model of such layers."""

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
    """Time passes, so many seconds forward and backward. Weights get a gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, forward_s: float, backward_s: float, *weights: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(*weights)
        ctx.backward_s = backward_s
        time.sleep(forward_s)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        time.sleep(ctx.backward_s)
        return grad, None, None, *(torch.full_like(w, 1e-3) for w in ctx.saved_tensors)


class Sleeping(nn.Module):
    """A layer of 4 MiB of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1 << 20))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return cast("torch.Tensor", Sleep.apply(x, FORWARD_S, BACKWARD_S, self.weight))


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
