"""Host memory of live tensors: where a background copy may read each, and the copy itself.

Copies go through memmove and numpy, which release the GIL and use one thread. Never through
torch: its OpenMP team would fight the one that is training, and a copy of 0.06 s was seen to
take 1.1 s on a shared host.
"""

import ctypes
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ftkit.checkpoint.chunks import PADDING, Unit
from ftkit.checkpoint.walk import Live
from ftkit.checkpoint.writer import SlabWriter

_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def as_numpy(tensor: torch.Tensor) -> NDArray[Any]:
    """A CPU tensor's memory as numpy, strides kept, whatever its dtype (bfloat16 as int16)."""
    tensor = tensor.detach()
    kind = _SAME_SIZE.get(tensor.element_size())
    array: NDArray[Any] = (tensor.view(kind) if kind is not None else tensor).numpy()
    return array


class LiveMemory:
    """Where the bytes of each live tensor can be read until the next optimizer step.

    * a contiguous CPU tensor: its own memory;
    * a strided CPU tensor: its own memory, copied in one piece (`whole`);
    * a CPU tensor that may change earlier (`Live.early`): a private copy, made by `bind`;
    * a CUDA tensor: pinned memory, filled from a side stream of its device; `wait` says when.

    Private and pinned memory is kept from one `bind` to the next, so its pages are warm.
    """

    def __init__(self) -> None:
        self._live: Sequence[Live] = ()
        self._wanted = range(0)
        self._plain = False
        self._addresses: dict[int, int] = {}
        self._strided: dict[int, NDArray[Any]] = {}
        self._private: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._arrived: list[torch.cuda.Event] = []

    @property
    def whole(self) -> frozenset[int]:
        """Indices of entries that must be copied in one piece."""
        return frozenset(self._strided)

    def bind(self, live: Sequence[Live], wanted: range) -> None:
        """Point at these tensors, and copy at once what may change at once.

        Given the very sequence of the last call, the tensors must lie where they lay then.

        Blocks for the early CPU tensors (small). For CUDA tensors it only enqueues copies; the
        current stream waits on the device for the early ones.

        Args:
          live: all tensors, in the order of the layout.
          wanted: indices of those that will be copied.
        """
        if live is self._live and wanted == self._wanted and self._plain:
            return  # the same tensors at the same addresses, and none needs a copy
        self._live = live
        self._wanted = wanted
        self._plain = True
        self._strided = {}
        self._addresses = {}
        self._arrived = []
        on_cuda = defaultdict[torch.device, list[Live]](list)
        for index in wanted:
            if live[index].tensor.device.type == "cuda":
                on_cuda[live[index].tensor.device].append(live[index])
        for device, items in on_cuda.items():
            self._plain = False
            self._stage(device, items)
        for index in wanted:
            item = live[index]
            tensor = item.tensor
            if tensor.device.type == "cuda":
                tensor = self._private[item.key]
            elif item.early:
                self._plain = False
                tensor = self._copy_early(item)
            elif not tensor.is_contiguous():
                self._strided[index] = as_numpy(tensor)
            self._addresses[index] = tensor.data_ptr()

    def wait(self) -> None:
        """Block until everything enqueued by `bind` is in host memory. Any thread."""
        for event in self._arrived:
            event.synchronize()

    def copy(self, unit: Unit, data: NDArray[np.uint8]) -> None:
        """Write one unit of the part's data. Any thread; releases the GIL."""
        base = int(data.ctypes.data)
        for piece in unit.pieces:
            if piece.entry == PADDING:
                # Zeros, so that equal states have equal digests.
                ctypes.memset(base + piece.at, 0, piece.count)
            elif piece.entry in self._strided:
                source = self._strided[piece.entry]
                target = data[piece.at : piece.at + piece.count]
                if piece.count == source.nbytes:
                    np.copyto(target.view(source.dtype).reshape(source.shape), source)
                else:  # cut by the bounds of the part
                    packed = np.ascontiguousarray(source).reshape(-1).view(np.uint8)
                    target[:] = packed[piece.offset : piece.offset + piece.count]
            else:
                source_at = self._addresses[piece.entry] + piece.offset
                ctypes.memmove(base + piece.at, source_at, piece.count)

    def _kept(self, item: Live, *, pinned: bool) -> torch.Tensor:
        kept = self._private.get(item.key)
        if kept is None or kept.shape != item.tensor.shape or kept.dtype != item.tensor.dtype:
            kept = torch.empty(item.tensor.shape, dtype=item.tensor.dtype, pin_memory=pinned)
            self._private[item.key] = kept
        return kept

    def _copy_early(self, item: Live) -> torch.Tensor:
        kept = self._kept(item, pinned=False)
        np.copyto(as_numpy(kept), as_numpy(item.tensor))
        return kept

    def _stage(self, device: torch.device, items: Sequence[Live]) -> None:
        # Of the tensors' own device, which need not be the current one: a copy runs in its order.
        current = torch.cuda.current_stream(device)
        stream = self._streams.get(device)
        if stream is None:
            made = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            stream = self._streams[device] = made
        stream.wait_stream(current)
        early_done: torch.cuda.Event | None = None
        with torch.no_grad(), torch.cuda.stream(stream):
            for item in sorted(items, key=lambda i: not i.early):
                if not item.early and early_done is None:
                    early_done = stream.record_event()
                self._kept(item, pinned=True).copy_(item.tensor, non_blocking=True)
                # The allocator must not hand this memory out again before the copy ran.
                item.tensor.record_stream(stream)
            arrived = stream.record_event()
        self._arrived.append(arrived)
        current.wait_event(early_done or arrived)


def fill(writer: SlabWriter, memory: LiveMemory, unit: Unit) -> int:
    """Copy one unit into its slab and enter its digests; returns the bytes copied."""
    memory.copy(unit, writer.data)
    writer.digest(unit.chunks)
    return sum(piece.count for piece in unit.pieces)
