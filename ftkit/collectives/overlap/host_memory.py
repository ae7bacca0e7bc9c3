"""Host memory for tensors that leave the device for a while: kept for reuse, filled aside.

On CUDA it is pinned, and a stream of its own copies. On the CPU it is ordinary memory, and a thread
copies: the same order of events, so that what is built on it can be tested anywhere.
"""

import threading
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch

Tensor = torch.Tensor

_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class HostPool:
    """Buffers of exact size, given out again once they were given back. Any thread."""

    def __init__(self, *, pinned: bool) -> None:
        """Own nothing yet. `pinned`: page-locked, for copies beside CUDA kernels."""
        self._pinned = pinned
        self._lock = threading.Lock()
        self._free: dict[int, list[Tensor]] = defaultdict(list)
        self.nbytes = 0
        """Bytes taken from the system so far."""

    def take(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """A buffer for a tensor of this shape and dtype, and the same as such a tensor."""
        nbytes = like.numel() * like.element_size()
        with self._lock:
            free = self._free[nbytes]
            buffer = free.pop() if free else None
            if buffer is None:
                self.nbytes += nbytes
        if buffer is None:
            buffer = torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._pinned)
        return buffer, buffer.view(like.dtype).view(like.shape)

    def give_back(self, buffers: list[Tensor]) -> None:
        """Nobody reads or writes these any more, but what the mover was asked to do before."""
        with self._lock:
            for buffer in buffers:
                self._free[buffer.numel()].append(buffer)


class Loaded(Protocol):
    """A tensor on its way back."""

    def result(self) -> Tensor: ...


class Mover(Protocol):
    """Copies one thing after another beside the computation."""

    def out(self, source: Tensor, host: Tensor) -> Callable[[], object]:
        """Copy to the host; `source` must stay as it is. What is returned raises if it did not."""

    def back(self, host: Tensor, device: torch.device) -> Loaded:
        """Copy to the device, into a new contiguous tensor."""

    def close(self) -> None:
        """Finish what was begun."""


class ThreadMover:
    """On the CPU. Through numpy: torch's own copy would start a second team of threads."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "ftkit-offload")

    def out(self, source: Tensor, host: Tensor) -> Callable[[], object]:
        version = source._version

        def copy() -> None:
            np.copyto(_numpy(host), _numpy(source))
            if source._version != version:
                raise RuntimeError(
                    "a tensor that backward needs was changed in place while it went to the host"
                )

        return self._thread.submit(copy).result

    def back(self, host: Tensor, device: torch.device) -> Loaded:
        def copy() -> Tensor:
            tensor = torch.empty_like(host)
            np.copyto(_numpy(tensor), _numpy(host))
            return tensor

        return self._thread.submit(copy)

    def close(self) -> None:
        self._thread.shutdown()


class StreamMover:
    """On CUDA: a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def out(self, source: Tensor, host: Tensor) -> Callable[[], object]:
        self._stream.wait_stream(torch.cuda.current_stream(source.device))
        with torch.cuda.stream(self._stream):
            host.copy_(source, non_blocking=True)
        # Its memory must not be used again before it was read.
        source.record_stream(self._stream)
        return lambda: None

    def back(self, host: Tensor, device: torch.device) -> Loaded:
        tensor = torch.empty(host.shape, dtype=host.dtype, device=device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            tensor.copy_(host, non_blocking=True)
            there = self._stream.record_event()
        tensor.record_stream(self._stream)
        return _OnStream(tensor, there)

    def close(self) -> None:
        self._stream.synchronize()


class _OnStream:
    def __init__(self, tensor: Tensor, there: Any) -> None:
        self._tensor, self._there = tensor, there

    def result(self) -> Tensor:
        torch.cuda.current_stream(self._tensor.device).wait_event(self._there)
        return self._tensor


def mover_of(device: torch.device) -> Mover:
    """The one for tensors of a device."""
    return StreamMover(device) if device.type == "cuda" else ThreadMover()


def copy_rate(source: Tensor, pool: HostPool, mover: Mover, clock: Callable[[], float]) -> float:
    """Bytes a second to the host, measured on a tensor: the better of two copies. Blocks."""
    best = 0.0
    for _ in range(2):
        buffer, host = pool.take(source)
        if source.is_cuda:
            torch.cuda.synchronize(source.device)
        began = clock()
        mover.out(source, host)
        mover.back(host[:0], source.device).result()
        if source.is_cuda:
            torch.cuda.synchronize(source.device)
        best = max(best, buffer.numel() / max(clock() - began, 1e-9))
        pool.give_back([buffer])
    return best


def _numpy(tensor: Tensor) -> np.ndarray[Any, Any]:
    tensor = tensor.detach()
    kind = _SAME_SIZE.get(tensor.element_size())
    array: np.ndarray[Any, Any] = (tensor.view(kind) if kind is not None else tensor).numpy()
    return array
