"""ArenaFile: the pages of an arena in shared memory, made before training needs them, and mapped.

Fresh pages are nearly the whole cost of a snapshot on CPU: a file gets them when it is made, a
slab that grows gets its further ones before it is written, and a process maps them all in one call.
"""

import contextlib
import errno
import logging
import mmap
import os
import socket
import stat
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ftkit.checkpoint.numa import MemoryNode, prefer, touching_from
from ftkit.checkpoint.slabs import PAGE, Geometry
from ftkit.core.errors import CapacityError, IntegrityError

logger = logging.getLogger(__name__)

#: madvise(2), Linux 5.14: allocate and map all pages of a range, ready to be written.
_POPULATE_WRITE = 23

#: Buffers in one system call; the kernel takes 1024.
_VECTOR = 512


class ArenaFile:
    """An arena file, mapped. What its bytes mean is `Arena`'s matter."""

    def __init__(self, path: Path, *, writable: bool) -> None:
        """Map the file at `path`.

        Raises:
          OSError: there is no such file, or it may not be opened. A symbolic link is refused.
          IntegrityError: it is not an arena, or its first page is damaged.
        """
        flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = os.open(path, flags)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise IntegrityError(f"{path} is not a regular file")
            self.geometry = Geometry.from_page(os.pread(fd, PAGE, 0))
            if status.st_size != self.geometry.file_bytes:
                # Reading past the end of a mapping would be a SIGBUS, not an exception.
                raise IntegrityError(
                    f"{path} has {status.st_size} bytes, its first page says "
                    f"{self.geometry.file_bytes}"
                )
            self.map = mmap.mmap(
                fd,
                status.st_size,
                flags=mmap.MAP_SHARED,
                prot=mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0),
            )
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd
        # Whoever forgets to close it must not use up the process's descriptors.
        self._close_fd = weakref.finalize(self, os.close, fd)
        self._reserved = [0] * self.geometry.slabs
        self._reserving = threading.Lock()
        self.path = path
        self.bytes: NDArray[np.uint8] = np.frombuffer(self.map, dtype=np.uint8)
        """All of the file; `map` is the same, for copies of small pieces."""

    def reserve(self, slab: int, part_bytes: int) -> None:
        """Give a slab pages for a part of this size, and map them. Any thread; once a size.

        Raises:
          CapacityError: there is no memory for them.
        """
        with self._reserving:
            if part_bytes <= self._reserved[slab]:
                return
            at, count = self.geometry.slab_at(slab), self.geometry.data_at + part_bytes
            _fallocate(self._fd, self.path, at, count)
            # A first touch costs as much as copying the page: have them all in one call.
            with contextlib.suppress(OSError):  # an old kernel; the touches will do it
                self.map.madvise(_POPULATE_WRITE, at, count)
            self._reserved[slab] = part_bytes

    def send(self, sock: socket.socket, at: int, count: int) -> None:
        """Send bytes of the file, straight from its pages. Blocks. OSError as the socket's."""
        with open(self._fd, "rb", buffering=0, closefd=False) as file:
            sock.sendfile(file, at, count)

    def read(self, at: int, into: Sequence[memoryview]) -> None:
        """Fill buffers one after another with bytes of the file. Any thread.

        Raises:
          IntegrityError: the file ends before they do.
        """
        for first in range(0, len(into), _VECTOR):
            views = into[first : first + _VECTOR]
            count = sum(map(len, views))
            # Of memory, all is there at once, or the file was cut.
            if os.preadv(self._fd, views, at) != count:
                raise IntegrityError(f"{self.path.name} was cut while it was read")
            at += count

    def close(self) -> None:
        """Unmap the file. Views handed out keep the memory until they are gone."""
        self.bytes = np.empty(0, dtype=np.uint8)
        self._fd = -1
        self._close_fd()
        try:
            self.map.close()
        except BufferError:
            # Someone still holds a view; the mapping goes with the last of them.
            pass


@contextmanager
def new_file(
    path: Path, geometry: Geometry, *, part_bytes: int, node: MemoryNode | None = None
) -> Iterator[Path]:
    """Make an arena file beside `path`, empty; it takes the place of `path` when the body is done.

    Whole or not at all: whatever goes wrong, what is at `path` stays. Blocks for about a second a
    gigabyte of pages. Only this user may read and write the file.

    Args:
      path: where it is to lie.
      geometry: its sizes.
      part_bytes: every slab gets pages for a part of this size; the rest of it is a hole.
      node: where pages are to lie, also those that come later; None for where they are touched first.

    Raises:
      CapacityError: the file system has not enough room.
    """
    holes = geometry.data_bytes - part_bytes
    _check_room(path.parent, geometry.file_bytes - geometry.slabs * holes)
    building = path.with_name(path.name + ".new")
    # Left by an agent that was killed right here, once.
    building.unlink(missing_ok=True)
    fd = os.open(building, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            os.ftruncate(fd, geometry.file_bytes)
            with _placed(fd, path, geometry.file_bytes, node):
                _fallocate(fd, path, 0, geometry.slab_at(0))
                for slab in range(geometry.slabs):
                    _fallocate(fd, path, geometry.slab_at(slab), geometry.data_at + part_bytes)
        finally:
            os.close(fd)
        with building.open("r+b") as file:
            file.write(geometry.to_page())
        yield building
        building.rename(path)
    except BaseException:
        building.unlink(missing_ok=True)
        raise


@contextmanager
def _placed(fd: int, path: Path, count: int, node: MemoryNode | None) -> Iterator[None]:
    """Inside, new pages of the file lie on `node`, if that can be had; otherwise it is said."""
    if node is None:
        yield
        return
    with mmap.mmap(fd, count) as mapped:
        whole = np.frombuffer(mapped, dtype=np.uint8)
        refused = prefer(whole.ctypes.data, count, node.number)
        del whole
    if not refused:
        yield
        return
    with touching_from(node) as there:
        where = (
            "the arena is touched from there, and may grow elsewhere"
            if there
            else ("it has no processors that could touch the arena instead, which lies anywhere")
        )
        logger.warning(
            "%s: memory node %d cannot be asked for (%s; in a container that takes CAP_SYS_NICE): %s",
            path.name, node.number, refused, where,
        )  # fmt: skip
        yield


def _fallocate(fd: int, path: Path, at: int, count: int) -> None:
    """Have pages for a range of the file, or CapacityError: a write without is a SIGBUS."""
    try:
        os.posix_fallocate(fd, at, count)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.ENOMEM):
            raise
        raise CapacityError(
            f"arena {path.name} needs {count} bytes more and {path.parent} ran out while they "
            f"were reserved: {error.strerror}"
        ) from error


def _check_room(directory: Path, need: int) -> None:
    """Refuse before anything is written: a half-made arena would take what others need."""
    status = os.statvfs(directory)
    free = status.f_bavail * status.f_frsize
    if need > free:
        raise CapacityError(
            f"an arena of {need} bytes does not fit: {directory} has {free} bytes free "
            f"({need - free} too few). Give it more room, or protect less state"
        )


if sys.byteorder != "little":
    raise ImportError("an arena is little-endian and used in place; this machine is big-endian")
