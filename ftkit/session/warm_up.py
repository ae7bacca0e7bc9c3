"""Warm-up: what torch does on its first step, done before others wait for it."""

import torch


def warm_up() -> None:
    """Run one tiny forward, backward and optimizer step, on tensors of its own.

    The first optimizer step of a process imports much of torch (about a second), and the first
    backward starts the autograd threads. A newcomer that pays for this after it was let in
    makes every other rank pay too.
    """
    weight = torch.nn.Parameter(torch.zeros(2, 2))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    (torch.ones(2, 2) @ weight).sum().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
