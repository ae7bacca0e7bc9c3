"""Limits: what the machine itself can do, measured in the run whose figures are held to them."""

import ctypes
import mmap
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from ftkit.checkpoint.chunks import CHUNK_BYTES
from ftkit.checkpoint.raw import address
from ftkit.checkpoint.state import bytes_of

Bytes = NDArray[np.uint8]


class Memory(NamedTuple):
    """Pieces of private memory, and a shared mapping with room for all; all pages are there."""

    pieces: Sequence[Bytes]
    shared: Bytes

    def copy(self) -> None:
        """One thread's memcpy of each piece into the mapping."""
        target = address(self.shared)
        for piece in self.pieces:
            ctypes.memmove(target, address(piece), piece.nbytes)
            target += piece.nbytes

    def copy_and_digest(self) -> None:
        """The same, and the digest of each chunk, one thing after another."""
        self.copy()
        view = self.shared.data
        for at in range(0, self.shared.nbytes, CHUNK_BYTES):
            xxhash.xxh3_64_intdigest(view[at : at + CHUNK_BYTES])


@contextmanager
def memory(pieces: Sequence[Bytes]) -> Iterator[Memory]:
    """A mapping for these pieces, warm."""
    total = sum(piece.nbytes for piece in pieces)
    fd = os.memfd_create("ftkit-limits")
    try:
        os.ftruncate(fd, total)
        mapped = mmap.mmap(fd, total)
    finally:
        os.close(fd)
    shared = np.frombuffer(mapped, np.uint8)
    shared[:] = 1
    yield Memory(pieces, shared)


def seconds(work: Callable[[], object]) -> float:
    """How long it takes, once."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def pieces_of(tensors: Iterable[torch.Tensor]) -> list[Bytes]:
    """The memory of contiguous CPU tensors."""
    return [np.frombuffer(bytes_of(tensor), np.uint8) for tensor in tensors]


def memcpy_s(tensors: Iterable[torch.Tensor], rounds: int = 5) -> float:
    """Seconds of the best of some copies of these tensors into warm shared memory."""
    with memory(pieces_of(tensors)) as warm:
        return min(seconds(warm.copy) for _ in range(rounds))


def forget(folder: Path) -> None:
    """Drop a folder's files from the page cache. They must be on disk already."""
    for path in folder.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fsync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)
