"""Weave: a stack of layers in two halves, one of which computes while the other communicates.

TokenWeave (MLSys'26), forward and backward. What follows a layer that is split over ranks is an
all-reduce, the residual and a norm; here it is a reduce-scatter, residual and norm on a rank's own
tokens, and an all-gather, so that the norm is done once per token::

    half A   layer ......... (scatter, norm, gather) layer ........
    half B          layer ......... (scatter, norm, gather) layer

Backward runs the same in reverse: a gather is followed by a scatter where forward had it the
other way. The engine of autograd would wait at each; so each layer has a graph of its own, and
their order is decided in `weave_run`.
"""

# autograd.Function has no types.
# mypy: disable-error-code="override,no-untyped-call"

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, TypeAlias, cast

import torch
import torch.distributed as dist
from torch import nn

from ftkit.collectives.overlap.auto import generation_of
from ftkit.collectives.overlap.autograd import once, uncompiled
from ftkit.collectives.overlap.flights import copied, of
from ftkit.collectives.overlap.tuning import SplitTuner
from ftkit.collectives.overlap.weave_run import Aside, Run, Spent
from ftkit.core.errors import UsageError

Tensor = torch.Tensor


def _thread() -> Aside:
    return ThreadPoolExecutor(1, "ftkit-weave")


class Layer(nn.Module):
    """A norm, and what is computed of the normed tokens: attention or an MLP, split over ranks.

    `body` maps (B, T, D) to (B, T, D): this rank's part of a sum over ranks, which nobody has
    added up (a row-parallel linear without its reduction). Samples must not meet in it, and what it
    learns are its own parameters.
    """

    def __init__(self, weight: Tensor, body: nn.Module) -> None:
        """Take over both.

        Args:
          weight: of the RMSNorm, shape (D,), the same on all ranks.
          body: see the class.
        """
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.body = body


Split: TypeAlias = bool | Literal["auto"]


class Weave(nn.Module):
    """x = x + all_reduce(body(rms_norm(x))), for each layer; (B, T, D) on all ranks to the same.

    A batch of one cannot be split. Gradients of the norms' weights are those of all tokens, the
    same on all ranks. Blocking; a fault ends it on all ranks with GenerationAborted, and an error
    in a body does so on the ranks that have none. Graphs are kept for one backward.

    Not on CUDA: what is done aside would run on another stream than what it waits for.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        *,
        group: Any = None,
        eps: float = 1e-6,
        split: Split = "auto",
        clock: Callable[[], float] = time.perf_counter,
        aside: Callable[[], Aside] = _thread,
    ) -> None:
        """Weave these layers.

        Args:
          layers: in order.
          group: the ranks; None for the default group.
          eps: of the norms.
          split: whether batches go in two halves; "auto" measures both at the first calls of each
            shape, and does not split where that does not pay.
          clock: gives seconds.
          aside: makes what communicates beside the computation.
        """
        super().__init__()
        if split not in (True, False, "auto"):
            raise UsageError(f'split is True, False or "auto", not {split!r}')
        self.layers = nn.ModuleList(layers)
        self._group, self._eps, self._split = group, eps, split
        self._clock, self._aside = clock, aside
        self._tuned: dict[tuple[object, ...], _Tuned] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Weave":
        return cast("Weave", copied(self, self._group, memo))

    @uncompiled
    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:
            raise UsageError(
                "a Weave does not run on CUDA: its second thread has a stream of its own, which does "
                "not wait for the first; move the stack to the CPU, or all-reduce after each layer"
            )
        group = of(self._group)
        keeps = torch.is_grad_enabled() and (
            x.requires_grad or any(p.requires_grad for p in self.parameters())
        )
        tuned = None
        if self._split == "auto":
            key = (generation_of(group), x.shape, x.dtype, keeps)
            tuned = self._tuned.setdefault(key, _Tuned())
            tuned.settle(group)
        split = tuned.tuner.split if tuned is not None else bool(self._split)
        layers = [cast("Layer", layer) for layer in self.layers]
        spent = Spent()
        if tuned is not None:
            tuned.last = spent
        run = Run(
            group,
            [layer.weight for layer in layers],
            [layer.body for layer in layers],
            self._eps,
            self._aside,
            self._clock,
            spent,
            split=split,
            keeps=keeps,
        )
        return cast("Tensor", _Woven.apply(run, x, *run.weights, *run.parameters))


class _Tuned:
    """A tuner, and the call that it is to be told of. A call is over when the next one begins."""

    def __init__(self) -> None:
        self.tuner = SplitTuner()
        self.last: Spent | None = None

    def settle(self, group: Any) -> None:
        """Tell of the last call. All ranks agree on what follows from it."""
        last, self.last = self.last, None
        if last is not None and (ask := self.tuner.note(last.waited_s, last.total_s)):
            told = torch.tensor(ask, dtype=torch.float64)
            options = dist.AllreduceOptions()
            options.reduceOp = dist.ReduceOp(dist.ReduceOp.MAX)
            group.allreduce([told], options).wait()
            self.tuner.agree(told.tolist())


class _Woven(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Run, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.run = run
        # The last thing saved: a checkpoint around us, which runs forward again until it has what
        # was saved, would end it in the middle of a layer, with the other half under way.
        ctx.save_for_backward(x.new_empty(0))
        return run.forward(x.detach())

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        run: Run = ctx.run
        run.begin_backward()
        _ = ctx.saved_tensors  # here such a checkpoint runs forward: before anything is under way
        of_x, of_weights, of_parameters = run.backward(grad.contiguous())
        given = [*run.weights, *run.parameters]
        found = [
            None if g is None else g.to(p.dtype)
            for g, p in zip([*of_weights, *of_parameters], given, strict=True)
        ]
        return None, of_x, *found
