"""HostSide: what a bucket of gradients on a GPU hands to the links, which are the CPU's, and back.

Slots are summed on the device. What a rank adds to the sum goes to pinned memory on a stream of its
own, beside the rest of the backward pass; the sum over all ranks comes back the same way. So the sum
has the bits that it has on the CPU, any number of ranks may share a device, and a rank that dies leaves
nothing on a device that others wait for: no communicator of NCCL has to be ended.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from ftkit.collectives.slot_tree import SlotNode


@cache
def _stream_of(device: torch.device) -> Any:
    """One for all buckets of a device: torch has thirty-two, and others need theirs."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class HostSide:
    """Of one bucket. Used by the training thread and the one of backward, one at a time."""

    def __init__(self, like: torch.Tensor) -> None:
        """Take memory for the sum.

        Args:
          like: the bucket's sum on the device: flat, contiguous. What is not on a GPU is copied at once.
        """
        self._on_gpu = like.is_cuda
        self._stream = _stream_of(like.device) if self._on_gpu else None
        self.out = self._buffer(like)
        """The sum over all ranks; `back` takes it to the device."""
        self._buffers: list[torch.Tensor] = []
        self._nodes: list[SlotNode] = []
        self._there: Any = None

    def send(self, nodes: Sequence[SlotNode]) -> None:
        """Begin to copy these. They are not to be changed before `arrived`; does not block."""
        while len(self._buffers) < len(nodes):
            self._buffers.append(self._buffer(self.out))
        self._nodes = [
            replace(node, value=buffer) for node, buffer in zip(nodes, self._buffers, strict=False)
        ]
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.no_grad(), torch.cuda.stream(self._stream):
            for node, buffer in zip(nodes, self._buffers, strict=False):
                buffer.copy_(node.value, non_blocking=self._on_gpu)
            if self._stream is not None:
                self._there = self._stream.record_event()

    def arrived(self) -> Sequence[SlotNode]:
        """What was sent, on the host, once it is there. Blocks until then."""
        if self._there is not None:
            self._there.synchronize()
        return self._nodes

    def back(self, out: torch.Tensor) -> None:
        """Copy the sum to the device, in the order of its current stream; does not block.

        The sum's memory may be written again once something sent after this has arrived.
        """
        out.copy_(self.out, non_blocking=self._on_gpu)

    def _buffer(self, like: torch.Tensor) -> torch.Tensor:
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=self._on_gpu)
