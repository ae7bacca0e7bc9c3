"""Warm-up: what a process does slowly the first time, done before others wait for it."""

import torch

from ftkit.checkpoint.state import ProtectedState


def warm_up() -> None:
    """Run one tiny forward, backward, optimizer step and restore, on tensors of its own.

    The first optimizer step of a process imports much of torch (about a second), and the first
    backward starts the autograd threads. A newcomer that pays for this after it was let in
    makes every other rank pay too.
    """
    with torch.random.fork_rng(devices=[]):  # the script's random numbers stay its own
        model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state = ProtectedState(model=model, optimizer=optimizer)
    layout = state.layout()
    state.load(layout, [bytes(layout.total_bytes)], state.small())
