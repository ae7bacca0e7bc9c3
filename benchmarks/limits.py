"""Limits: what the machine itself can do, measured in the run whose figures are held to them."""

import ctypes
import mmap
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from ftkit.checkpoint.chunks import CHUNK_BYTES
from ftkit.checkpoint.raw import address

Bytes = NDArray[np.uint8]

#: One call of memmove; it releases the GIL and needs no other thread.
PIECE_BYTES = 16 << 20


class Memory(NamedTuple):
    """Private memory and a shared mapping of as many bytes; all pages there."""

    private: Bytes
    shared: Bytes

    def copy(self) -> None:
        """One thread's memcpy into the mapping, as fast as it goes."""
        source, target = address(self.private), address(self.shared)
        for at in range(0, self.private.nbytes, PIECE_BYTES):
            count = min(PIECE_BYTES, self.private.nbytes - at)
            ctypes.memmove(target + at, source + at, count)

    def copy_and_digest(self) -> None:
        """The same, and the digest of each chunk, one thing after another."""
        self.copy()
        view = self.private.data
        for at in range(0, self.private.nbytes, CHUNK_BYTES):
            xxhash.xxh3_64_intdigest(view[at : at + CHUNK_BYTES])


@contextmanager
def memory(total: int) -> Iterator[Memory]:
    """So many bytes on each side, warm."""
    fd = os.memfd_create("ftkit-limits")
    try:
        os.ftruncate(fd, total)
        mapped = mmap.mmap(fd, total)
    finally:
        os.close(fd)
    shared = np.frombuffer(mapped, np.uint8)
    shared[:] = 1
    yield Memory(np.ones(total, np.uint8), shared)


def seconds(work: Callable[[], object]) -> float:
    """How long it takes, once."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def memcpy_s(total: int, rounds: int = 5) -> float:
    """Seconds of the best of some copies of so many bytes into warm shared memory."""
    with memory(total) as warm:
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
