"""Layers: one layer of a pipeline at a time, timed, with random numbers that no cut can change."""

import random
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import nn

from ftkit.collectives.group import Group
from ftkit.collectives.staged import StageReducer
from ftkit.core.errors import UsageError
from ftkit.core.trace import Trace
from ftkit.recovery.data_cursor import derive
from ftkit.recovery.recut import Layer, Stage, recut
from ftkit.recovery.stages import Told, agree
from ftkit.recovery.swapped import Swap

if TYPE_CHECKING:
    from ftkit.session.ends import Ends

#: Passes of a layer that its time is the median of.
_PASSES = 32


class Layers:
    """What this rank knows of the layers of its pipeline. The training thread's."""

    def __init__(self, group: Group, trace: Trace, seats: int) -> None:
        """Nothing is measured yet."""
        self._group, self._trace, self._seats = group, trace, seats
        self._forward: dict[int, deque[float]] = {}
        self._backward: dict[int, deque[float]] = {}
        self._heard: dict[int, float] = {}
        self._held = range(0)
        self._modules: dict[int, nn.Module] = {}
        self.on_gpu = False
        """Whether a layer ran on one: what was measured is then how long it took to launch."""
        self.raised = set[int]()
        """Layers that were averaged once: they learn a little faster (`approximate.LR_RAISE`)."""
        self.norm_wanted = False
        """Whether `grad_norm` is looked at."""
        self.swap_wanted = False
        """Whether every other slot must be played with the outer stages swapped (CheckFree+)."""
        self.swap: Swap | None = None
        """The layers that change places, once a cut is agreed; the same in every world."""
        self.swapped = False
        """Whether the open step's slots were played so."""
        self.numbers: dict[int, int] = {}
        """Layer of each tensor, by its id, as `Session.swapped` was told after the present cut."""
        self.ends: Ends | None = None
        """Copies of the first layer and the last, of the present world."""
        self.bounds: tuple[int, ...] = ()
        """The cut that was agreed last."""
        self.grad_norm: float | None = None
        """Of this stage at its last step; None where nobody looks at it, or before the first."""
        self.target: tuple[int, ...] | None = None
        """While layers move in the same world: the cut that all ranks have agreed on."""
        self.on_cut: Callable[[Sequence[int]], None] | None = None
        """Told of each cut, once it is agreed."""

    def module(self, index: int) -> nn.Module:
        """The module that ran as layer `index` here. KeyError: none did since the last cut."""
        return self._modules[index]

    @property
    def seconds(self) -> dict[int, float]:
        """Of a micro-batch, forward and backward, by layer that was measured here."""
        found = dict[int, float]()
        for index, forward in self._forward.items():
            # What takes no gradient (an embedding of tokens) has no end of backward to see: a
            # backward pass costs about two forward passes.
            backward = self._backward.get(index)
            passed = statistics.median(forward)
            found[index] = passed + (statistics.median(backward) if backward else 2 * passed)
        return found

    def hear(self, costs: Iterable[Mapping[int, float]]) -> None:
        """All ranks told what they measured."""
        for told in costs:
            self._heard.update(told)

    def look(self, reducer: object) -> None:
        """The gradients of this stage are there: note what is wanted of them.

        Raises:
          UsageError: the slots were to be played by `Session.swapped`, and were not.
        """
        if self.swap_wanted and not self.swapped:
            raise UsageError(
                'allow_approximate="checkfree+" needs a pipeline that swaps its outer stages, or '
                "nobody learns their part: play the slots by session.swapped(...).play(...)"
            )
        self.swapped = False
        if self.norm_wanted and isinstance(reducer, StageReducer):
            self.grad_norm = reducer.grad_norm

    def cut(self, costs: list[float]) -> tuple[int, ...]:
        """Agree with all ranks which layers each holds. Blocks. As `Session.cut`."""
        if self.swap_wanted:
            layers = [Layer(seconds=cost, state_bytes=1) for cost in costs]
            self.swap = Swap.of(recut(layers, [Stage()] * self._seats).bounds)
        mine = Told(
            seconds={**self._heard, **self.seconds},
            held=self._held,
            target=self.target or (),
            raised=tuple(sorted(self.raised)),
        )
        told = [Told.unpack(one) for one in self._group.exchange(mine.pack()).wait()]
        self.raised.update(*(one.raised for one in told))
        agreed = agree(costs, told, seats=self._seats)
        bounds, rank = agreed.cut.bounds, self._group.rank
        self._trace.event(
            "cut",
            generation=self._group.world.generation,
            bounds=list(bounds),
            moved=agreed.moved,
            reason=agreed.reason,
        )
        self._held, self.bounds = range(bounds[rank], bounds[rank + 1]), bounds
        self._forward.clear()
        self._backward.clear()
        self._modules.clear()
        self.numbers = {}
        if self.on_cut is not None:
            self.on_cut(bounds)
        return bounds

    def run(self, index: int, layer: nn.Module, inputs: tuple[Any, ...], *, key: int) -> Any:
        """One layer's forward pass over a slot, drawing from `key`; its backward is timed, too."""
        seed_all(derive(key, "layer", index) >> 1)
        self._modules[index] = layer
        start = time.perf_counter()
        output = layer(*inputs)
        self._note(self._forward, index, time.perf_counter() - start)
        first = inputs[0] if inputs else None
        self.on_gpu = self.on_gpu or (isinstance(output, torch.Tensor) and output.is_cuda)
        if (
            isinstance(output, torch.Tensor)
            and output.requires_grad
            and isinstance(first, torch.Tensor)
            and first.requires_grad
        ):
            began = 0.0

            def begin(_: torch.Tensor) -> None:
                nonlocal began
                began = time.perf_counter()

            def end(_: torch.Tensor) -> None:
                self._note(self._backward, index, time.perf_counter() - began)
                # A schedule receives into the same tensor, step after step: it would keep them all.
                handle.remove()

            output.register_hook(begin)  # type: ignore[no-untyped-call]
            handle = first.register_hook(end)  # type: ignore[no-untyped-call]
        return output

    def _note(self, into: dict[int, deque[float]], index: int, seconds: float) -> None:
        into.setdefault(index, deque(maxlen=_PASSES)).append(seconds)


def seed_all(key: int) -> None:
    """Have torch, numpy and random draw from `key`, of 63 bits."""
    if _has_devices():
        torch.manual_seed(key)
    else:
        # That would note down the stack for each kind of device that may come: a millisecond a slot.
        torch.default_generator.manual_seed(key)
    random.seed(key)
    numpy.random.seed(key & 0xFFFFFFFF)


@cache
def _has_devices() -> bool:
    return torch.accelerator.is_available()
