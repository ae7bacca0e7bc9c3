"""The outer optimizer of low-communication training: SGD with Nesterov momentum; pure.

DiLoCo (arXiv 2311.08105, section 2): members train alone for many inner steps; the mean of
how far each has moved, taken as a gradient, moves the outer parameters::

    g = mean over members of (outer parameters - inner parameters)
    momentum = mu * momentum + g
    outer parameters -= lr * (g + mu * momentum)
"""

from collections.abc import Iterable

import torch


class Outer:
    """Outer parameters and momentum, flat. What all members hold alike, bit for bit."""

    def __init__(self, params: Iterable[torch.Tensor], *, lr: float, momentum: float) -> None:
        """Begin at the values of `params`.

        Args:
          params: the model's, in the same order on every member; dense, floating, on the CPU.
            Kept, read by `drift` and written by `impose`.
          lr: outer learning rate; 0.7 in the paper.
          momentum: 0.9 in the paper; 0 with lr 1 is plain averaging of parameters.

        Raises:
          ValueError: no parameters, a parameter that is not floating, or numbers out of range.
        """
        self._inner = list(params)
        if not self._inner or any(not p.dtype.is_floating_point for p in self._inner):
            raise ValueError("the outer optimizer needs floating parameters, and at least one")
        if not lr > 0 or not 0 <= momentum < 1:
            raise ValueError(f"need lr > 0 and 0 <= momentum < 1, got {lr} and {momentum}")
        self.lr, self.momentum_factor = lr, momentum
        wide = any(p.dtype == torch.float64 for p in self._inner)
        dtype = torch.float64 if wide else torch.float32
        self.params = torch.empty(sum(p.numel() for p in self._inner), dtype=dtype)
        """As of the last outer step; flat, float32, or float64 when a parameter is."""
        self.momentum = torch.zeros_like(self.params)
        self._gather(self.params)

    def drift(self) -> torch.Tensor:
        """How far the model has moved from `params`, as a gradient: new, flat memory."""
        moved = torch.empty_like(self.params)
        self._gather(moved)
        return torch.sub(self.params, moved, out=moved)

    def impose(self, ahead: torch.Tensor | None = None) -> None:
        """Set the model to `params`, or to where a drift of `ahead` has already moved it."""
        flat = self.params if ahead is None else self.params - ahead
        at = 0
        with torch.no_grad():
            for param in self._inner:
                part = flat[at : at + param.numel()]
                param.copy_(part.view(param.shape))
                at += param.numel()

    def step(self, mean_drift: torch.Tensor) -> None:
        """One outer step. `mean_drift` is flat and is used up."""
        # Each operation rounds by itself. A fused multiply-add would round once where a loop
        # is vectorized and twice at its end, which depends on the number of threads; members
        # that differ in that would drift apart.
        self.momentum.mul_(self.momentum_factor).add_(mean_drift)
        mean_drift.add_(self.momentum.mul(self.momentum_factor))
        self.params.sub_(mean_drift.mul_(self.lr))

    def _gather(self, flat: torch.Tensor) -> None:
        at = 0
        for param in self._inner:
            flat[at : at + param.numel()].view(param.shape).copy_(param.detach())
            at += param.numel()
