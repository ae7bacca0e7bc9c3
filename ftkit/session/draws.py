"""SampleDraws: every random number of a forward pass is drawn by sample, whatever the micro-batch.

A model draws for a whole micro-batch at once: dropout's mask has a row for each of its samples. Here
row i comes from a generator of its own, seeded by (seed, step, number of the draw, sample i), so
that it does not matter which samples were put together, or where::

    torch's default generator   a chain of seeds, one a draw; it never draws itself
    seed of the draw + sample   seeds the generator of one row

Activation checkpoints put the default generator back before they compute again, and so find the
same seeds. Whatever draws in another way moves that generator, and is noticed.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ftkit.core.errors import UsageError
from ftkit.core.ids import Slot
from ftkit.recovery.data_cursor import derive

_aten = torch.ops.aten

#: Fill their first argument.
_FILL = {
    _aten.bernoulli_.float, _aten.uniform_.default, _aten.normal_.default,
    _aten.exponential_.default, _aten.random_.default, getattr(_aten.random_, "from"),
    _aten.random_.to,
}  # fmt: skip

#: Make a tensor, by size or like another, that one of those fills.
_MAKE: dict[Any, tuple[Any, Any]] = {
    _aten.rand.default: (torch.empty, _aten.uniform_.default),
    _aten.randn.default: (torch.empty, _aten.normal_.default),
    _aten.rand_like.default: (torch.empty_like, _aten.uniform_.default),
    _aten.randn_like.default: (torch.empty_like, _aten.normal_.default),
}


class SampleDraws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """In force between `begin` and `end`, on the training thread and in its backward passes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._samples: Sequence[Slot] = ()
        self._on = False
        self._before: list[Any] = []

    def begin(self, key: int, samples: Sequence[Slot]) -> None:
        """A micro-batch of these samples comes next.

        Args:
          key: of the step, 63 bits; the same for all its micro-batches.
          samples: by their place in the global batch, row by row.
        """
        self.stop()
        torch.default_generator.manual_seed(key)
        random.seed(key)
        numpy.random.seed(key & 0xFFFFFFFF)
        self._samples = samples
        self._before = _elsewhere()
        self.__enter__()  # type: ignore[no-untyped-call]
        self._on = True

    def end(self) -> None:
        """The micro-batch has been played. Raises UsageError when something drew otherwise."""
        self.stop()
        self._check_unmoved()
        if _elsewhere() != self._before:
            raise UsageError(
                'consistency="scaled" draws by sample, and the forward pass drew from random, from '
                "numpy or from CUDA kernels of their own: draw by torch.rand, dropout and their like, "
                'one row a sample, or use consistency="bitwise"'
            )

    def stop(self) -> None:
        """Draw as ever again; also in the middle of a micro-batch."""
        if self._on:
            self._on = False
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _FILL:
            return self._fill(args[0], lambda row, g: func(row, *args[1:], generator=g), kwargs)
        if func in _MAKE:
            make, fill = _MAKE[func]
            return self._fill(make(*args, **kwargs), lambda row, g: fill(row, generator=g))
        if func is _aten.bernoulli.default:
            out = args[0].clone()
            return self._fill(
                out, lambda row, g: row.copy_(_aten.bernoulli.default(row, generator=g)), kwargs
            )
        if func is _aten.native_dropout.default and args[2] is not False:
            return self._dropout(*args[:2])
        return func(*args, **kwargs)

    def _dropout(self, values: torch.Tensor, p: float) -> tuple[torch.Tensor, torch.Tensor]:
        kept = torch.empty_like(values, dtype=torch.bool)
        self._fill(kept, lambda row, g: row.bernoulli_(1 - p, generator=g))
        return values * kept * (1 / (1 - p) if p < 1 else 0.0), kept

    def _fill(
        self,
        out: torch.Tensor,
        fill: Callable[[torch.Tensor, torch.Generator], object],
        kwargs: dict[str, Any] | None = None,
    ) -> torch.Tensor:
        """Fill `out` row by row, each from its sample's generator."""
        if kwargs and kwargs.get("generator") is not None:
            raise UsageError(
                'consistency="scaled" draws by sample: leave generator= out in the forward pass'
            )
        count = len(self._samples)
        if out.dim() == 0 or out.shape[0] != count:
            raise UsageError(
                f"the forward pass draws a tensor of shape {tuple(out.shape)} for {count} samples, so "
                'it cannot be told which number is whose: consistency="scaled" needs the batch as '
                'the first dimension of whatever is drawn; or use consistency="bitwise"'
            )
        self._check_unmoved()
        key = torch.default_generator.initial_seed()
        torch.default_generator.manual_seed(derive(key, "next") >> 1)
        generator = torch.Generator(out.device)
        for row, sample in zip(out.unbind(0), self._samples, strict=True):
            fill(row, generator.manual_seed(derive(key, sample) >> 1))
        return out

    def _check_unmoved(self) -> None:
        """Raise UsageError when torch's default generator has drawn since it was seeded last."""
        mine = torch.default_generator
        fresh = torch.Generator().manual_seed(mine.initial_seed())
        if not torch.equal(mine.get_state(), fresh.get_state()):
            raise UsageError(
                'consistency="scaled" draws by sample, and the forward pass drew by an operation that '
                "cannot be cut by sample (randperm, multinomial, a generator's state set anew): use "
                'dropout, torch.rand and their like, or consistency="bitwise"'
            )


def _elsewhere() -> list[Any]:
    """The state of the generators that a forward pass must not draw from."""
    numbers: Any = numpy.random.get_state()
    found: list[Any] = [random.getstate(), *numbers[2:], numbers[1].tobytes()]
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        found.append(torch.cuda.get_rng_state().numpy().tobytes())
    return found
