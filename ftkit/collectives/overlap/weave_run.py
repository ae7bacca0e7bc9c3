"""Run: one call of a weave, forward and backward. What computes when, and what crosses beside it.

An error in here ends the call on all ranks, and nothing is under way when a pass is over.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import nn
from torch.func import functional_call

from ftkit.collectives.overlap.crossing import Crossing
from ftkit.collectives.overlap.flights import Flights
from ftkit.collectives.overlap.norm import add_rms_norm, rms_norm_backward
from ftkit.collectives.overlap.parts import pieces
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


@dataclass(slots=True)
class Spent:
    """Seconds of one call, forward and, where there was one, backward."""

    total_s: float = 0.0
    waited_s: float = 0.0
    """For what others send."""


class Half:
    """Some samples, on their way through the layers."""

    def __init__(self, x: Tensor, number: int, size: int, rank: int) -> None:
        self.number = number
        self.shape = x.shape
        self.rows = x.shape[0] * x.shape[1]
        self.each = -(-self.rows // size)
        """Rows of a rank: the same for all, so the last ones may hold rows of padding."""
        self.size, self.rank = size, rank
        self.residual = self.ours(x).clone()
        """What is carried past the layers, of our rows: forward the sum so far, backward its gradient."""
        self.totals: list[Tensor] = []
        """What each norm was taken of, of our rows."""
        self.graphs: list[tuple[Tensor, Tensor]] = []
        """Of each layer, what went in and what came out."""
        self.crossing: Crossing | None = None
        self.changed: Pending | None = None
        """The change in it, on the thread aside."""

    def padded(self, x: Tensor) -> Tensor:
        """Samples as rows, as many for each rank."""
        rows = x.reshape(self.rows, x.shape[-1])
        missing = self.each * self.size - self.rows
        return torch.cat([rows, rows.new_zeros(missing, rows.shape[1])]) if missing else rows

    def ours(self, x: Tensor) -> Tensor:
        """Of these, the rows that are this rank's."""
        return self.padded(x)[self.rank * self.each : (self.rank + 1) * self.each]

    def whole(self, rows: Tensor) -> Tensor:
        """The inverse of `padded`."""
        return rows[: self.rows].view(self.shape)


class Run:
    """One call, forward and then backward."""

    def __init__(
        self,
        group: Any,
        weights: Sequence[nn.Parameter],
        bodies: Sequence[nn.Module],
        eps: float,
        aside: Callable[[], Aside],
        clock: Callable[[], float],
        spent: Spent,
        *,
        split: bool,
        keeps: bool,
    ) -> None:
        self._group, self._bodies, self._eps = group, bodies, eps
        self._make_aside, self._clock, self._split, self._spent = aside, clock, split, spent
        self.weights = weights
        self.parameters = [
            p
            for p in dict.fromkeys(p for body in bodies for p in body.parameters())
            if p.requires_grad
        ]
        self._keeps = keeps
        """Whether there will be a backward."""
        self._own = {p: p.detach().requires_grad_() for p in self.parameters if keeps}
        """What stands for each in our graphs, in the same memory: hooks on the parameter see the sum
        of both halves, and see it once."""
        self._used = False
        self._over = False
        """Whether nothing more is to be begun: it failed here, or elsewhere."""
        self._cause: BaseException | None = None
        """The first error of ours, if it failed here."""
        self._halves: list[Half] = []

    def forward(self, x: Tensor) -> Tensor:
        size, rank = int(self._group.size()), int(self._group.rank())
        count = min(2, x.shape[0]) if self._split else 1
        spans = list(pieces(0, x.shape[0], count)) or [(0, 0)]
        self._halves = [Half(x[a:b], i, size, rank) for i, (a, b) in enumerate(spans)]
        with self._beside() as submit:
            for number, body in enumerate(self._bodies):
                for half, (a, b) in zip(self._halves, spans, strict=True):
                    if number == 0:
                        # Everybody has x: nothing is to be gathered yet.
                        rows, _ = self._normed(0, x.new_zeros(1), x[a:b])
                    else:
                        rows = half.whole(self._wait(half))
                    leaf = rows.detach().requires_grad_(self._keeps)
                    with torch.set_grad_enabled(self._keeps):
                        part = self._made(body, leaf, looks=self._keeps and half is self._halves[0])
                    if self._keeps:
                        half.graphs.append((leaf, part))
                        half.totals.append(half.residual)
                    change = partial(self._between, number + 1)
                    last = half is self._halves[-1] and number == len(self._bodies) - 1
                    self._cross(submit, half, part.detach(), change, last=last)
            if not self._bodies:
                return x.clone()
            return torch.cat([half.whole(self._wait(half)) for half in self._halves])

    def _made(self, body: nn.Module, rows: Tensor, *, looks: bool) -> Tensor:
        named = body.named_parameters(remove_duplicate=False)
        own = {name: self._own[p] for name, p in named if p in self._own}
        scripted = (m for m in body.modules() if isinstance(m, torch.jit.ScriptModule))
        if looks and any(p in self._own for m in scripted for p in m.parameters()):
            raise UsageError(
                f"{type(body).__name__} learns in TorchScript, which lets no other tensors stand for its "
                "parameters, as a Weave needs: give it the module that was scripted"
            )
        part = cast("Tensor", functional_call(body, own, rows) if own else body(rows))
        if looks:
            known = {id(rows), *map(id, self._own.values())}
            if any(id(end) not in known for end in _ends_of(part)):
                raise UsageError(
                    f"{type(body).__name__} computes with a tensor that needs a gradient and would get "
                    "none: a layer of a Weave has gradients of its input, and of the parameters that "
                    "are attributes of its body, or of a module in it"
                )
        return part

    def begin_backward(self) -> None:
        """Raise UsageError, unless it is the first one."""
        if self._used:
            raise UsageError(
                "a Weave keeps its graphs for one backward, retain_graph or not: call it again"
            )
        self._used = True

    def backward(self, grad: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
        halves = self._halves
        wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
        of_weights = grad.new_zeros(len(self._bodies), grad.shape[-1], dtype=wide)
        of_parameters: list[Tensor | None] = [None] * len(self.parameters)
        with self._beside() as submit:
            parts = dict(
                zip(halves, grad.split_with_sizes([half.shape[0] for half in halves]), strict=True)
            )
            for half, part in parts.items():
                half.residual = half.ours(part)
            for number in reversed(range(len(self._bodies))):
                for half in reversed(halves):
                    leaf, part = half.graphs.pop()
                    # Everybody has the gradient that backward begins with.
                    begins = number == len(self._bodies) - 1
                    of_part = parts.pop(half) if begins else half.whole(self._wait(half))
                    ends = [leaf, *self._own.values()]
                    found: list[Tensor | None] = [
                        *torch.autograd.grad(part, ends, of_part, allow_unused=True)
                    ]
                    of_leaf = torch.zeros_like(leaf) if found[0] is None else found[0]
                    of_parameters = _added(of_parameters, found[1:])
                    change = partial(self._back, number, half.totals.pop(), of_weights)
                    self._cross(
                        submit, half, of_leaf, change, last=half is halves[0] and not number
                    )
            if not self._bodies:
                return grad, [], of_parameters
            for half in halves:
                self._result(half.changed)
            with Flights(self._group, "weave backward") as flights:
                flights.all_reduce(of_weights)
                of_x = torch.cat([half.whole(self._wait(half)) for half in halves])
        return of_x, list(of_weights), of_parameters

    # -- what crosses -------------------------------------------------------------------------

    @contextmanager
    def _beside(self) -> Iterator[Callable[[Callable[[], Any]], Pending]]:
        """What submits work to be done aside; an error in here is one on all ranks.

        At its end nothing is under way.
        """
        began = self._clock()
        aside = self._make_aside()
        try:
            yield lambda act: aside.submit(partial(self._unless_over, act))
            for half in self._halves:
                self._end(half)
        except BaseException as error:
            self._failed(error)
            if self._cause is not None and self._cause is not error:
                # What was waited for ended by our own abort.
                raise self._cause from error
            raise
        finally:
            aside.shutdown()
            for half in self._halves:
                if half.crossing is not None:
                    half.crossing.drain()
                half.crossing = half.changed = None
            self._spent.total_s += self._clock() - began

    def _failed(self, error: BaseException) -> None:
        self._over = True
        if not isinstance(error, GenerationAborted):
            self._cause = self._cause or error
            with suppress(Exception):
                self._group.abort()

    def _unless_over(self, act: Callable[[], Any]) -> Any:
        if self._over:
            raise GenerationAborted("the call it belongs to has failed")
        try:
            return act()
        except BaseException as error:
            # Who waits may wait for other rows, and never come to hear of this.
            self._failed(error)
            raise

    def _cross(
        self,
        submit: Callable[[Callable[[], Any]], Pending],
        half: Half,
        part: Tensor,
        change: Callable[[Tensor, Tensor, Tensor, int, int], Tensor],
        *,
        last: bool,
    ) -> None:
        """Let what a layer made go, and have it and the residual changed aside.

        It travels in the dtype of the residual: what comes back is the norm of that, or at last the
        residual itself, and autocast may have made less of a layer. Nothing is computed beside the
        `last` of a pass.
        """
        self._end(half)
        rows = half.padded(part.to(half.residual.dtype)).contiguous()
        before, half.residual = half.residual, torch.empty_like(half.residual)
        # Beside computing, a message costs cores more than cutting rows gains the link.
        cut = last or len(self._halves) == 1
        half.crossing = Crossing(self._group, "weave", rows, lane=half.number, cut=cut)
        act = partial(change, before, half.residual)
        half.changed = submit(partial(half.crossing.change, act))

    def _wait(self, half: Half) -> Tensor:
        """The rows that come out of a crossing. Blocks."""
        assert half.crossing is not None, "something is under way"
        self._result(half.changed)
        began = self._clock()
        rows = half.crossing.rows()
        if not self._keeps:
            half.crossing.end()  # a layer may do its work in place, and our rows are still leaving
        self._spent.waited_s += self._clock() - began
        return rows

    def _result(self, changed: Pending | None) -> None:
        assert changed is not None, "something is under way"
        began = self._clock()
        changed.result()
        self._spent.waited_s += self._clock() - began

    def _end(self, half: Half) -> None:
        """What went out long ago has left: a crossing's rows are all here."""
        if half.crossing is not None:
            half.crossing.end()

    # -- aside ----------------------------------------------------------------------------------

    def _between(
        self, number: int, before: Tensor, after: Tensor, mine: Tensor, a: int, b: int
    ) -> Tensor:
        """Residual and norm of some rows: what goes into the next layer, or comes out at last."""
        if number == len(self._bodies):
            return before[a:b] + mine
        y, after[a:b] = self._normed(number, mine, before[a:b])
        return y

    def _normed(self, number: int, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return add_rms_norm(x, residual, self.weights[number].detach(), self._eps)

    def _back(
        self,
        number: int,
        total: Tensor,
        of_weights: Tensor,
        before: Tensor,
        after: Tensor,
        mine: Tensor,
        a: int,
        b: int,
    ) -> Tensor:
        """The same, back."""
        weight = self.weights[number].detach()
        of_total, of_weight = rms_norm_backward(mine, total[a:b], weight, self._eps)
        of_weights[number] += of_weight
        return torch.add(before[a:b], of_total, out=after[a:b])


def _added(sums: Sequence[Tensor | None], more: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Term by term, of those that are there. Not in place: gradients may share memory with others."""
    return [a if b is None else b if a is None else a + b for a, b in zip(sums, more, strict=True)]


def _ends_of(tensor: Tensor) -> Iterator[Tensor]:
    """The leaves of its graph: what a backward over it could find gradients of."""
    seen: set[Any] = set()
    ahead = [tensor.grad_fn]
    while ahead:
        node: Any = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if not node.next_functions and hasattr(node, "variable"):
            yield node.variable
        ahead += [before for before, _ in node.next_functions]
