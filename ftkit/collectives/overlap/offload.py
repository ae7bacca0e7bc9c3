"""Offload: a block's saved activations, some tokens' on the host and the others' computed again.

MEMO (SIGMOD'25, arXiv 2407.12117). Forward runs once, over all tokens. What autograd saves of it is cut
by tokens: the first ones' rows go to the host beside the computation, the rest is forgotten. As
backward comes near a block, its rows are fetched; the others come from the block, run again over their
tokens alone. Attention is not run again, for which it would need all tokens: its output is kept on the
host whole. Backward itself sees the very tensors that it would have seen, whole.
"""

import time
import weakref
from collections.abc import Callable
from typing import Any, Self

import torch

from ftkit.collectives.overlap.host_memory import HostPool, Mover, copy_rate, mover_of
from ftkit.collectives.overlap.offload_call import OffloadedCall
from ftkit.collectives.overlap.offload_profile import BlockProfile, Fraction, Profiler
from ftkit.collectives.overlap.offload_trace import Block

Tensor = torch.Tensor


def offload_activations(
    fraction: Fraction = "auto",
    *,
    dim: int = 1,
    exact: bool = True,
    host_bytes: int | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> "Offload":
    """Keep what backward needs of some tokens on the host, and compute the others' again.

    ::

        with offload_activations() as offload:
            for block in blocks:
                x = offload(block, x)
            loss(x).backward()

    Forward runs once and as ever. Backward sees the tensors it would have seen: those of the first
    tokens come back from the host while the block behind is at work, and those of the rest from
    running the block's token-wise parts over them.

    Args:
      fraction: of the tokens, whose activations go to the host. "auto" measures each block at its
        first call for a shape (four forward passes, of which nothing is kept), and takes what adds
        least to a step: as much as hides behind the block's forward, as a rule.
      dim: the dimension of tokens in inputs and result.
      exact: a split at which recomputed rows have other bits (kernels may add otherwise for fewer
        rows; the first call looks) is not used; then it is all on the host, or all computed again.
        False accepts the rounding.
      host_bytes: for "auto": room on the host for one block.
      clock: seconds.

    Returns:
      One for all blocks of a model, which lend each other host memory; pinned for CUDA.
    """
    return Offload(fraction, dim=dim, exact=exact, host_bytes=host_bytes, clock=clock)


class Offload:
    """See `offload_activations`. The training thread's; backward may be on another."""

    def __init__(
        self,
        fraction: Fraction,
        *,
        dim: int,
        exact: bool,
        host_bytes: int | None,
        clock: Callable[[], float],
    ) -> None:
        if fraction != "auto" and not 0 <= fraction <= 1:
            raise ValueError(f'fraction must be in [0, 1] or "auto", got {fraction}')
        self._dim = dim
        self._profiler = Profiler(
            fraction=fraction,
            dim=dim,
            exact=exact,
            host_bytes=host_bytes,
            clock=clock,
            rate=lambda tensor: copy_rate(tensor, *self._mover(tensor.device), clock),
        )
        self._profiles: weakref.WeakKeyDictionary[Any, dict[object, BlockProfile]] = (
            weakref.WeakKeyDictionary()
        )
        self._movers: dict[torch.device, tuple[HostPool, Mover]] = {}
        self._order: list[weakref.ref[OffloadedCall]] = []

    def __call__(self, block: Block, *inputs: Tensor) -> Tensor:
        """`block(*inputs)`, with what backward needs of it offloaded.

        Args:
          block: maps tensors to one; the same object at every step, as what was found out about it
            is kept with it. Tokens meet in `scaled_dot_product_attention` alone.
          inputs: each has the tokens in `dim`, as has the result.

        Raises:
          UsageError: tokens meet elsewhere in the block, or it draws random numbers.
        """
        if not torch.is_grad_enabled():
            return block(*inputs)
        profile = self.profile(block, *inputs)
        pool, mover = self._mover(inputs[0].device)
        call = OffloadedCall(block, inputs, profile, self._dim, mover, pool)
        result = call.forward(inputs)
        self._order = [r for r in self._order if r() is not None]
        before = self._order[-1] if self._order else None
        self._order.append(me := weakref.ref(call))

        def backward_is_near(grad: Tensor) -> None:
            for ref in (me, before):
                if ref is not None and (near := ref()) is not None:
                    near.prefetch()

        if result.requires_grad:
            result.register_hook(backward_is_near)  # type: ignore[no-untyped-call]
        return result

    def profile(self, block: Block, *inputs: Tensor) -> BlockProfile:
        """What is known about `block` for inputs of these shapes; found out at the first call."""
        known = self._profiles.setdefault(block, {})
        kind = inputs[0].device.type
        key = (
            torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
            *((tuple(x.shape), x.dtype, x.device, x.requires_grad) for x in inputs),
        )
        if key not in known:
            known[key] = self._profiler.profile(block, inputs)
        return known[key]

    @property
    def host_bytes(self) -> int:
        """Host memory taken so far."""
        return sum(pool.nbytes for pool, _ in self._movers.values())

    def close(self) -> None:
        """End the copies. Calls that were not gone backward through are lost."""
        for _, mover in self._movers.values():
            mover.close()
        self._movers.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _mover(self, device: torch.device) -> tuple[HostPool, Mover]:
        if device not in self._movers:
            pool = HostPool(pinned=device.type == "cuda")
            self._movers[device] = pool, mover_of(device)
        return self._movers[device]
