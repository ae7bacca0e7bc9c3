"""Weave: a stack of layers in two halves, one of which computes while the other communicates.

TokenWeave (MLSys'26), forward and backward. What follows a layer that is split over ranks is an
all-reduce, the residual and a norm; here it is a reduce-scatter, residual and norm on a rank's own
tokens, and an all-gather, so that the norm is done once per token::

    half A   layer ......... (scatter, norm, gather) layer ........
    half B          layer ......... (scatter, norm, gather) layer

Backward runs the same in reverse: a gather is followed by a scatter where forward had it the
other way. The engine of autograd would wait at each; so each layer has a graph of its own, and
their order is decided here.
"""

# autograd.Function has no types.
# mypy: disable-error-code="override,no-untyped-call"

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Literal, Protocol, TypeAlias, cast

import torch
import torch.distributed as dist
from torch import nn

from ftkit.collectives.overlap.auto import generation_of
from ftkit.collectives.overlap.flights import Flights, of
from ftkit.collectives.overlap.norm import add_rms_norm, rms_norm_backward
from ftkit.collectives.overlap.parts import pieces
from ftkit.collectives.overlap.tuning import SplitTuner
from ftkit.core.errors import GenerationAborted, UsageError

Tensor = torch.Tensor


class Pending(Protocol):
    """Something that is done aside."""

    def result(self) -> Any:
        """What came of it. Blocks; raises what it raised."""


class Aside(Protocol):
    """Does one thing after another on a thread of its own."""

    def submit(self, act: Callable[[], Any], /) -> Pending:
        """Do it when what was submitted before is done."""

    def shutdown(self) -> None:
        """Wait until all is done."""


class Layer(nn.Module):
    """A norm, and what is computed of the normed tokens: attention or an MLP, split over ranks.

    `body` maps (B, T, D) to (B, T, D): this rank's part of a sum over ranks, which nobody has
    added up (a row-parallel linear without its reduction). Samples must not meet in it.
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
        aside: Callable[[], Aside] = lambda: ThreadPoolExecutor(1, "ftkit-weave"),
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
        self.layers = nn.ModuleList(layers)
        self._group, self._eps, self._split = group, eps, split
        self._clock, self._aside = clock, aside
        self._tuners: dict[tuple[object, ...], SplitTuner] = {}

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:
            raise UsageError(
                "a Weave does not run on CUDA: its second thread has a stream of its own, which does "
                "not wait for the first; move the stack to the CPU, or all-reduce after each layer"
            )
        group = of(self._group)
        key = (generation_of(group), x.shape, x.dtype)
        tuner = self._tuners.setdefault(key, SplitTuner()) if self._split == "auto" else None
        split = tuner.split if tuner is not None else bool(self._split)
        layers = [cast("Layer", layer) for layer in self.layers]
        keeps = torch.is_grad_enabled() and (
            x.requires_grad or any(p.requires_grad for p in self.parameters())
        )
        run = _Run(group, layers, self._eps, self._aside, self._clock, split=split, keeps=keeps)
        began = self._clock()
        out = cast("Tensor", _Woven.apply(run, x, *run.weights, *run.parameters))
        if tuner is not None and (ask := tuner.note(run.waited_s, self._clock() - began)):
            told = torch.tensor(ask, dtype=torch.float64)
            options = dist.AllreduceOptions()
            options.reduceOp = dist.ReduceOp(dist.ReduceOp.MAX)
            group.allreduce([told], options).wait()
            tuner.agree(told.tolist())
        return out


class _Half:
    """Some samples, on their way through the layers."""

    def __init__(self, x: Tensor, size: int, rank: int) -> None:
        self.shape = x.shape
        self.rows = x.shape[0] * x.shape[1]
        self.each = -(-self.rows // size)
        """Rows of a rank: the same for all, so the last ones may hold rows of padding."""
        self.size, self.rank = size, rank
        self.totals: list[Tensor] = []
        """What each norm was taken of, of our rows."""
        self.graphs: list[tuple[Tensor, Tensor]] = []
        """Of each layer, what went in and what came out."""
        self.gathered: Pending | None = None

    def padded(self, x: Tensor) -> Tensor:
        """Samples as rows, as many for each rank."""
        rows = x.reshape(self.rows, x.shape[-1])
        missing = self.each * self.size - self.rows
        return torch.cat([rows, rows.new_zeros(missing, rows.shape[1])]) if missing else rows

    def ours(self, x: Tensor) -> Tensor:
        return self.padded(x)[self.rank * self.each : (self.rank + 1) * self.each]

    def whole(self, rows: Tensor) -> Tensor:
        """The inverse of `padded`."""
        return rows[: self.rows].view(self.shape)


class _Run:
    """One call, forward and then backward."""

    def __init__(
        self,
        group: Any,
        layers: Sequence[Layer],
        eps: float,
        aside: Callable[[], Aside],
        clock: Callable[[], float],
        *,
        split: bool,
        keeps: bool,
    ) -> None:
        self._group, self._layers, self._eps = group, layers, eps
        self._make_aside, self._clock, self._split = aside, clock, split
        self.weights = [layer.weight for layer in layers]
        self.parameters = [
            p
            for p in dict.fromkeys(p for one in layers for p in one.body.parameters())
            if p.requires_grad
        ]
        self.waited_s = 0.0
        self._keeps = keeps
        """Whether there will be a backward."""
        self._used = False
        self._over = False
        """Whether nothing more is to be begun: it failed here, or elsewhere."""
        self._halves: list[_Half] = []

    def forward(self, x: Tensor) -> Tensor:
        size, rank = int(self._group.size()), int(self._group.rank())
        count = min(2, x.shape[0]) if self._split else 1
        spans = list(pieces(0, x.shape[0], count)) or [(0, 0)]
        self._halves = [_Half(x[a:b], size, rank) for a, b in spans]
        with self._beside() as submit:
            for half, (a, b) in zip(self._halves, spans, strict=True):
                own = half.ours(x[a:b])
                nothing = torch.zeros_like(own)
                half.gathered = submit(partial(self._enter, half, nothing, own, 0))
            for number, layer in enumerate(self._layers):
                for half in self._halves:
                    leaf = half.whole(self._wait(half)).detach().requires_grad_(self._keeps)
                    with torch.set_grad_enabled(self._keeps):
                        part = layer.body(leaf)
                    if self._keeps:
                        half.graphs.append((leaf, part))
                    half.gathered = submit(partial(self._between, half, part.detach(), number + 1))
            return torch.cat([half.whole(self._wait(half)) for half in self._halves])

    @contextmanager
    def _beside(self) -> Iterator[Callable[[Callable[[], Any]], Pending]]:
        """What submits work to be done aside; an error in here is one on all ranks."""
        aside = self._make_aside()
        try:
            yield lambda act: aside.submit(partial(self._unless_over, act))
        except BaseException as error:
            self._over = True
            if not isinstance(error, GenerationAborted):
                with suppress(Exception):
                    self._group.abort()
            raise
        finally:
            aside.shutdown()

    def _unless_over(self, act: Callable[[], Any]) -> Any:
        if self._over:
            raise GenerationAborted("the call it belongs to has failed")
        return act()

    def backward(self, grad: Tensor) -> tuple[Tensor, list[Tensor | None], list[Tensor | None]]:
        if self._used:
            raise UsageError(
                "a Weave keeps its graphs for one backward, retain_graph or not: call it again"
            )
        self._used = True
        halves = self._halves
        of_weights: list[Tensor | None] = [None] * len(self._layers)
        of_parameters: list[Tensor | None] = [None] * len(self.parameters)
        carried: dict[_Half, Tensor] = {}
        with self._beside() as submit:
            at = 0
            for half in halves:
                some = grad[at : at + half.shape[0]]
                at += half.shape[0]
                carried[half] = half.ours(some)
                half.gathered = _Ready(half.padded(some))
            for number in reversed(range(len(self._layers))):
                for half in reversed(halves):
                    leaf, part = half.graphs.pop()
                    of_part = half.whole(self._wait(half))
                    of_leaf, *found = torch.autograd.grad(
                        part, [leaf, *self.parameters], of_part, allow_unused=True
                    )
                    of_parameters = _added(of_parameters, found)
                    half.gathered = submit(
                        partial(self._back, half, of_leaf, carried, of_weights, number)
                    )
            of_x = torch.cat([half.whole(self._wait(half)) for half in halves])
        with Flights(self._group, "weave backward") as flights:
            for one in of_weights:
                if one is not None:
                    flights.all_reduce(one)
        return of_x, of_weights, of_parameters

    # -- aside ----------------------------------------------------------------------------------

    def _between(self, half: _Half, part: Tensor, number: int) -> Tensor:
        """Scatter, residual, norm, gather: what goes into the next layer, or comes out at last."""
        with Flights(self._group, "weave") as flights:
            mine = part.new_empty(half.each, part.shape[-1])
            flights.reduce_scatter(mine, half.padded(part)).wait()
        return self._enter(half, mine, half.totals[-1], number)

    def _enter(self, half: _Half, mine: Tensor, residual: Tensor, number: int) -> Tensor:
        if number < len(self._layers):
            y, total = add_rms_norm(mine, residual, self.weights[number].detach(), self._eps)
            if not self._keeps:
                half.totals.clear()
            half.totals.append(total)
        else:
            y = residual + mine
        return self._gather(half, y)

    def _back(
        self,
        half: _Half,
        of_leaf: Tensor,
        carried: dict[_Half, Tensor],
        of_weights: list[Tensor | None],
        number: int,
    ) -> Tensor:
        with Flights(self._group, "weave backward") as flights:
            mine = of_leaf.new_empty(half.each, of_leaf.shape[-1])
            flights.reduce_scatter(mine, half.padded(of_leaf)).wait()
        weight = self.weights[number].detach()
        of_total, of_weight = rms_norm_backward(mine, half.totals[number], weight, self._eps)
        (of_weights[number],) = _added([of_weights[number]], [of_weight])
        carried[half] = carried[half] + of_total
        return self._gather(half, carried[half])

    def _gather(self, half: _Half, mine: Tensor) -> Tensor:
        with Flights(self._group, "weave") as flights:
            rows = mine.new_empty(half.each * half.size, mine.shape[-1])
            flights.all_gather(rows, mine.contiguous()).wait()
        return rows

    def _wait(self, half: _Half) -> Tensor:
        assert half.gathered is not None, "something is always under way"
        began = self._clock()
        rows: Tensor = half.gathered.result()
        self.waited_s += self._clock() - began
        return rows


class _Woven(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: _Run, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.run = run
        return run.forward(x.detach())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        run: _Run = ctx.run
        of_x, of_weights, of_parameters = run.backward(grad.contiguous())
        given = [*run.weights, *run.parameters]
        found = [
            None if g is None else g.to(p.dtype)
            for g, p in zip([*of_weights, *of_parameters], given, strict=True)
        ]
        return None, of_x, *found


class _Ready:
    """Nothing had to be done."""

    def __init__(self, value: Tensor) -> None:
        self._value = value

    def result(self) -> Tensor:
        return self._value


def _added(sums: Sequence[Tensor | None], more: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Term by term, of those that are there."""
    return [a if b is None else b if a is None else a + b for a, b in zip(sums, more, strict=True)]
