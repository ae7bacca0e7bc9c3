"""RaisedRate: layers that were averaged from their neighbours learn a little faster (CheckFree).

The paper raises the learning rate of the whole stage. Its layers may be with other ones on a rank since,
in one parameter group, and a scheduler sets that group's rate anew at each step. So the step itself is
lengthened: what the optimizer changed of these parameters is changed by as much again times
`LR_RAISE - 1`, which is the raise exactly where a step is linear in the rate, as those of SGD, Adam and
AdamW are.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ftkit.session.approximate import LR_RAISE
from ftkit.session.mean_stage import layer_of


def raise_rate(model: nn.Module, optimizer: Optimizer, raised: Collection[int]) -> None:
    """Lengthen the steps of `optimizer` for the layers that are in `raised` as it steps.

    Costs a copy of their parameters while it does, and nothing where there are none.
    """
    layers = [
        (found[1], parameter)
        for name, parameter in model.named_parameters()
        if (found := layer_of(f"model/{name}"))
    ]
    before = list[tuple[nn.Parameter, torch.Tensor]]()

    def copy(*_: Any) -> None:
        before[:] = [
            (p, p.detach().clone())
            for number, p in layers
            if number in raised and p.grad is not None
        ]

    @torch.no_grad()
    def lengthen(*_: Any) -> None:
        for parameter, old in before:
            parameter.add_(parameter - old, alpha=LR_RAISE - 1)
        before.clear()

    optimizer.register_step_pre_hook(copy)
    optimizer.register_step_post_hook(lengthen)
