"""Offload: a block's saved activations, some tokens' on the host and the others' computed again.

MEMO (SIGMOD'25, arXiv 2407.12117). Forward runs once, over all tokens. What autograd saves of it is cut
by tokens: the first ones' rows go to the host beside the computation, the rest is forgotten. As
backward comes near a block, its rows are fetched; the others come from the block, run again over their
tokens alone. Attention is not run again, for which it would need all tokens: its output is kept on the
host whole. Backward itself sees the very tensors that it would have seen, whole.
"""

import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Self

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from ftkit.collectives.overlap.host_memory import HostPool, Loaded, Mover, copy_rate, mover_of
from ftkit.collectives.overlap.offload_study import (
    AttentionSeen,
    Block,
    Cut,
    Fraction,
    Key,
    Student,
    Study,
    not_kept,
    output_rows,
    same_memory,
    worth_sending,
)
from ftkit.core.errors import UsageError

Tensor = torch.Tensor


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
        self._student = Student(
            fraction=fraction,
            dim=dim,
            exact=exact,
            host_bytes=host_bytes,
            clock=clock,
            rate=lambda tensor: copy_rate(tensor, *self._mover(tensor.device), clock),
        )
        self._studies: weakref.WeakKeyDictionary[Any, dict[object, Study]] = (
            weakref.WeakKeyDictionary()
        )
        self._movers: dict[torch.device, tuple[HostPool, Mover]] = {}
        self._order: list[weakref.ref[_Call]] = []

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
        study = self.study(block, *inputs)
        pool, mover = self._mover(inputs[0].device)
        call = _Call(block, inputs, study, self._dim, mover, pool)
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

    def study(self, block: Block, *inputs: Tensor) -> Study:
        """What is known about `block` for inputs of these shapes; found out at the first call."""
        known = self._studies.setdefault(block, {})
        kind = inputs[0].device.type
        key = (
            torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
            *((tuple(x.shape), x.dtype, x.device, x.requires_grad) for x in inputs),
        )
        if key not in known:
            known[key] = self._student.study(block, inputs)
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


class _Call:
    """One call of a block: its activations, until backward has used them."""

    def __init__(
        self,
        block: Block,
        inputs: Sequence[Tensor],
        study: Study,
        dim: int,
        mover: Mover,
        pool: HostPool,
    ) -> None:
        self._block, self._study, self._dim = block, study, dim
        self._mover, self._pool = mover, pool
        self._device = inputs[0].device
        self._grads = [x.requires_grad for x in inputs]
        self._autocast = (
            torch.is_autocast_enabled(self._device.type),
            torch.get_autocast_dtype(self._device.type),
        )
        buffers = list[Tensor]()
        self._buffers = buffers
        weakref.finalize(self, pool.give_back, buffers)
        self._lock = threading.RLock()
        self._inputs: list[_Parcel] = []
        self._outputs: list[_Parcel] = []
        self._parcels: list[_Parcel] = []
        self._wanted: set[Key] = set()
        """What backward needs rows of that are nowhere."""
        self._again: dict[Key, Tensor] = {}
        """Of these, rows that were recomputed and not used yet."""
        self._numbers, self._attentions = count(), count()
        self._attending: dict[Key, Tensor] = {}
        """Queries, keys and values of the attention that runs."""
        self._under_way: dict[object, tuple[StorageWeakRef, _Parcel]] = {}
        """What was sent in forward and is still there: saved a second time, it is not sent again."""

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        if self._study.rows < self._study.tokens:
            self._inputs = [self._send(x) for x in inputs]
        try:
            with saved_tensors_hooks(self._pack, _unpack), AttentionSeen(self._attend):
                return self._block(*inputs)
        finally:
            self._under_way.clear()

    def prefetch(self) -> None:
        """Begin to fetch what is on the host."""
        with self._lock:
            for parcel in self._parcels:
                parcel.fetch(self._mover, self._device)

    def _attend(self, run: Callable[[], Tensor], qkv: Sequence[Tensor]) -> Tensor:
        number = next(self._attentions)
        self._attending = {(number, i): tensor for i, tensor in enumerate(qkv)}
        try:
            out = run()
        finally:
            self._attending = {}
        if self._study.rows < self._study.tokens:
            self._outputs.append(self._send(out))
        return out

    def _send(self, tensor: Tensor) -> "_Parcel":
        tensor = tensor.detach()
        if (parcel := self._sent_before(tensor)) is not None:
            return parcel
        buffer, host = self._pool.take(tensor)
        self._buffers.append(buffer)
        parcel = _Parcel(host, self._mover.out(tensor, host))
        self._parcels.append(parcel)
        storage = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
        self._under_way[_where(tensor)] = storage, parcel
        return parcel

    def _sent_before(self, tensor: Tensor) -> "_Parcel | None":
        storage, parcel = self._under_way.get(_where(tensor), (None, None))
        gone = storage is None or storage.expired()  # type: ignore[no-untyped-call]
        return None if gone else parcel

    def _pack(self, tensor: Tensor) -> Any:
        if self._attending:
            key = next((k for k, t in self._attending.items() if same_memory(tensor, t)), None)
            cut = None if key is None else self._study.cuts.get(key)
            stays = cut is None and not worth_sending(tensor)
        else:
            key = next(self._numbers)
            cut = self._study.cuts.get(key)
            stays = cut is None
        if stays:
            # A leaf is a parameter: it must be found itself. Others would hold their own graph.
            return tensor if tensor.is_leaf else tensor.detach()
        rows, first = self._study.rows, self._sent_before(tensor)
        if first is not None:
            cut = None  # all of it is on the host
        elif cut is None:
            first = self._send(tensor)
        elif rows:
            first = self._send(cut.rows(tensor.detach(), 0, rows))
        if cut is not None and rows < self._study.tokens:
            assert key is not None, "what is cut has a key"
            self._wanted.add(key)
        strides = torch.empty_like(tensor, device="meta").stride()
        return _Saved(self, key, cut, first, tensor.shape, strides, tensor.dtype)

    def restore(self, saved: "_Saved") -> Tensor:
        """A tensor as it was saved. Runs the block again for the rows that are nowhere."""
        cut, rows, tokens = saved.cut, self._study.rows, self._study.tokens
        with self._lock:
            whole = torch.empty_strided(
                saved.shape, saved.strides, dtype=saved.dtype, device=self._device
            )
            if saved.first is not None:
                into = whole if cut is None else cut.rows(whole, 0, rows)
                into.copy_(saved.first.there(self._mover, self._device))
            if cut is not None and rows < tokens:
                assert saved.key is not None, "what is cut has a key"
                if saved.key not in self._again:
                    self._recompute()
                cut.rows(whole, rows).copy_(self._again.pop(saved.key))
            return whole

    def _recompute(self) -> None:
        """Run the block over the last tokens, for what it saves."""
        rows = self._study.rows
        inputs = []
        for parcel, grad in zip(self._inputs, self._grads, strict=True):
            x = parcel.there(self._mover, self._device)
            part = x.narrow(self._dim, rows, self._study.tokens - rows)
            inputs.append(part.detach().requires_grad_(grad))
        outputs, numbers, attentions = iter(self._outputs), count(), count()

        def take(key: Key, tensor: Tensor) -> None:
            cut = self._study.cuts.get(key)
            if key in self._wanted and cut is not None:
                self._again[key] = cut.rows(tensor.detach(), 0)

        def attend(run: Callable[[], Tensor], qkv: Sequence[Tensor]) -> Tensor:
            number = next(attentions)
            for i, tensor in enumerate(qkv):
                take((number, i), tensor)
            return output_rows(next(outputs).there(self._mover, self._device), rows, qkv)

        def pack(tensor: Tensor) -> None:
            take(next(numbers), tensor)

        kind, (enabled, dtype) = self._device.type, self._autocast
        with (
            torch.enable_grad(),
            torch.autocast(kind, dtype=dtype, enabled=enabled),
            saved_tensors_hooks(pack, not_kept),
            AttentionSeen(attend),
        ):
            self._block(*inputs)
        if missing := self._wanted - self._again.keys():
            raise UsageError(
                f"a block that was run again saved {len(missing)} tensors less than at first: it "
                "must do the same at every call"
            )


@dataclass(slots=True, eq=False)
class _Parcel:
    """Memory on the host, and the way there and back."""

    host: Tensor
    sent: Callable[[], object]
    coming: Loaded | None = None

    def fetch(self, mover: Mover, device: torch.device) -> Loaded:
        if self.coming is None:
            self.coming = mover.back(self.host, device)
        return self.coming

    def there(self, mover: Mover, device: torch.device) -> Tensor:
        """On the device. Blocks; the next call fetches it anew."""
        tensor = self.fetch(mover, device).result()
        self.coming = None
        self.sent()
        return tensor


@dataclass(frozen=True, slots=True, eq=False)
class _Saved:
    """What autograd holds in place of a tensor."""

    call: _Call
    key: Key | None
    cut: Cut | None
    first: _Parcel | None
    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype


def _unpack(saved: Any) -> Tensor:
    tensor: Tensor = saved.call.restore(saved) if isinstance(saved, _Saved) else saved
    return tensor


def _where(tensor: Tensor) -> object:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor._version


def offload_activations(
    fraction: Fraction = "auto",
    *,
    dim: int = 1,
    exact: bool = True,
    host_bytes: int | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Offload:
    """Keep what backward needs of some tokens on the host, and compute the others' again.

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
