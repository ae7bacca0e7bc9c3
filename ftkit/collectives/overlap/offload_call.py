"""OffloadedCall: one call of a block, its activations on the host until backward has used them."""

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from ftkit.collectives.overlap.host_memory import HostPool, Loaded, Mover
from ftkit.collectives.overlap.offload_profile import BlockProfile
from ftkit.collectives.overlap.offload_trace import (
    AttentionSeen,
    Block,
    Cut,
    Key,
    input_rows,
    not_kept,
    output_rows,
    same_memory,
    worth_sending,
)
from ftkit.core.errors import UsageError

Tensor = torch.Tensor


class OffloadedCall:
    """One call of a block: its activations, until backward has used them."""

    def __init__(
        self,
        block: Block,
        inputs: Sequence[Tensor],
        profile: BlockProfile,
        dim: int,
        mover: Mover,
        pool: HostPool,
    ) -> None:
        self._block, self._profile, self._dim = block, profile, dim
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
        if self._profile.rows < self._profile.tokens:
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
        if self._profile.rows < self._profile.tokens:
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
            cut = None if key is None else self._profile.cuts.get(key)
            stays = cut is None and not worth_sending(tensor)
        else:
            key = next(self._numbers)
            cut = self._profile.cuts.get(key)
            stays = cut is None
        if stays:
            # A leaf is a parameter: it must be found itself. Others would hold their own graph.
            return tensor if tensor.is_leaf else tensor.detach()
        rows, first = self._profile.rows, self._sent_before(tensor)
        if first is not None:
            cut = None  # all of it is on the host
        elif cut is None:
            first = self._send(tensor)
        elif rows:
            first = self._send(cut.rows(tensor.detach(), 0, rows))
        if cut is not None and rows < self._profile.tokens:
            assert key is not None, "what is cut has a key"
            self._wanted.add(key)
        strides = torch.empty_like(tensor, device="meta").stride()
        return _Saved(self, key, cut, first, tensor.shape, strides, tensor.dtype)

    def restore(self, saved: "_Saved") -> Tensor:
        """A tensor as it was saved. Runs the block again for the rows that are nowhere."""
        cut, rows, tokens = saved.cut, self._profile.rows, self._profile.tokens
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
        rows = self._profile.rows
        inputs = []
        for parcel, grad in zip(self._inputs, self._grads, strict=True):
            x = parcel.there(self._mover, self._device)
            inputs.append(input_rows(x, self._dim, rows, grad=grad))
        outputs, numbers, attentions = iter(self._outputs), count(), count()

        def take(key: Key, tensor: Tensor) -> None:
            cut = self._profile.cuts.get(key)
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

    call: OffloadedCall
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
