"""Resident memory: buffers that the other processes of a host map, and read like their own.

Reading a peer's private memory costs the kernel more for finding its pages than for copying
them; a mapped page costs nothing, and what is folded need not be copied first. Each segment
is an anonymous file that cannot shrink. A peer opens it through `/proc`, which asks for no
more than what reading the process's memory asks for.

A segment is given back to the system when the last array or tensor on it is gone, even while
peers still have it mapped: they then read zeros, and learn from the valid word (see `cma`)
that what they read is void.
"""

import bisect
import ctypes
import fcntl
import math
import mmap
import os
import threading
import weakref
from collections import OrderedDict
from typing import NamedTuple

import numpy as np
import torch

from ftkit.collectives.arithmetic import Bytes

#: Every segment holds a descriptor; a process has a thousand of them, and other uses for them.
SEGMENTS_MAX = 256
_MAPPINGS_MAX = 512
_ALIGN = 64
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_PUNCH_HOLE, _KEEP_SIZE = 2, 1
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, since Linux 5.14
_libc = ctypes.CDLL(None, use_errno=True)
_size, _pointer = ctypes.c_size_t, ctypes.c_void_p
_libc.mmap.argtypes = (_pointer, _size, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64)
_libc.mmap.restype = _pointer
_libc.munmap.argtypes = (_pointer, _size)
_libc.madvise.argtypes = (_pointer, _size, ctypes.c_int)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class _Mapping:
    """A shared mapping; Python's own would keep a descriptor of its own for each."""

    def __init__(self, fd: int, nbytes: int, flags: int = 0) -> None:
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        address = _libc.mmap(None, nbytes, protection, mmap.MAP_SHARED | flags, fd, 0)
        if address in (None, _pointer(-1).value):
            raise OSError(ctypes.get_errno(), f"cannot map {nbytes} bytes")
        self.address: int = address
        self.__array_interface__ = {
            "version": 3,
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
        }

    def array(self) -> Bytes:
        """The memory. It and all arrays and tensors made of it hold the mapping."""
        return np.asarray(self)


class Segment(NamedTuple):
    """One resident segment of this process."""

    start: int
    """Address of its first byte here."""
    nbytes: int
    fd: int
    serial: int
    """Its inode: tells a reader whether descriptor `fd` is still this segment."""


class Place(NamedTuple):
    """Where a peer finds memory of ours."""

    fd: int
    serial: int
    offset: int


class _Segments:
    """The segments of this process. Looked up without a lock, from any thread."""

    def __init__(self) -> None:
        # A finalizer may run in the middle of `add`, on the same thread.
        self._lock = threading.RLock()
        self._all: dict[int, Segment] = {}
        self._sorted: tuple[list[int], list[Segment]] = ([], [])

    def add(self, segment: Segment) -> None:
        with self._lock:
            self._all[segment.start] = segment
            self._renew()

    def remove(self, segment: Segment) -> None:
        with self._lock:
            del self._all[segment.start]
            self._renew()

    def __len__(self) -> int:
        return len(self._all)

    def find(self, address: int, nbytes: int) -> Place | None:
        starts, segments = self._sorted
        at = bisect.bisect_right(starts, address) - 1
        if at < 0:
            return None
        segment = segments[at]
        offset = address - segment.start
        if offset + nbytes > segment.nbytes:
            return None
        return Place(segment.fd, segment.serial, offset)

    def _renew(self) -> None:
        ordered = [self._all[start] for start in sorted(self._all)]
        self._sorted = ([segment.start for segment in ordered], ordered)


_segments = _Segments()


def find(address: int, nbytes: int) -> Place | None:
    """Where peers find these bytes; None for private memory. Any thread."""
    return _segments.find(address, nbytes)


def allocate(nbytes: int) -> Bytes:
    """Memory of its own segment, zeroed; private where the system gives no more of the other."""
    if not nbytes or len(_segments) >= SEGMENTS_MAX:
        return np.zeros(nbytes, dtype=np.uint8)
    try:
        fd = os.memfd_create("ftkit-resident", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError:
        return np.zeros(nbytes, dtype=np.uint8)
    try:
        os.ftruncate(fd, nbytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        memory = _Mapping(fd, nbytes)
    except OSError:
        os.close(fd)
        return np.zeros(nbytes, dtype=np.uint8)
    _libc.madvise(memory.address, nbytes, mmap.MADV_HUGEPAGE)
    # Now, rather than page by page in the middle of an operation.
    _libc.madvise(memory.address, nbytes, _POPULATE_WRITE)
    segment = Segment(memory.address, nbytes, fd, os.fstat(fd).st_ino)
    _segments.add(segment)
    weakref.finalize(memory, _free, segment, os.getpid()).atexit = False
    return memory.array()


def _free(segment: Segment, owner: int) -> None:
    _segments.remove(segment)
    _libc.munmap(segment.start, segment.nbytes)
    if os.getpid() == owner:
        # Pages that a peer has mapped would stay as long as its mapping; there is nothing to
        # read. A forked child that drops its tensors must not empty its parent's.
        _libc.fallocate(segment.fd, _PUNCH_HOLE | _KEEP_SIZE, 0, segment.nbytes)
    os.close(segment.fd)


def resident(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A zeroed CPU tensor in resident memory: collectives on it skip a copy.

    It is an ordinary tensor otherwise; its memory is freed with the last view of it. For a few
    large, long-lived buffers: each takes a descriptor, and where there are no more (or no
    `memfd_create`) the memory is ordinary memory.
    """
    count = math.prod(shape)
    if not count:
        return torch.empty(shape, dtype=dtype)
    return torch.from_numpy(allocate(count * dtype.itemsize)).view(dtype).view(shape)


class Pool:
    """Cuts resident memory into buffers that live about as long as each other."""

    def __init__(self, slab_bytes: int) -> None:
        """Take `slab_bytes` from the system at a time; they go back when no buffer is left."""
        self._slab_bytes = slab_bytes
        self._slab: Bytes = np.empty(0, dtype=np.uint8)

    def take(self, nbytes: int) -> Bytes:
        """Memory for one buffer, zeroed, aligned to a cache line."""
        room = -(-nbytes // _ALIGN) * _ALIGN
        if room > self._slab.size:
            self._slab = allocate(max(room, self._slab_bytes))
        taken, self._slab = self._slab[:nbytes], self._slab[room:]
        return taken

    def tensor(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        """A flat tensor of `count` elements, zeroed."""
        return torch.from_numpy(self.take(count * dtype.itemsize)).view(dtype)


class Mappings:
    """What a peer's resident segments look like from here. One thread."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._known: OrderedDict[tuple[int, int], Bytes | None] = OrderedDict()

    def view(self, place: Place, nbytes: int) -> Bytes | None:
        """These bytes of the peer, shared with it; None when they cannot be mapped."""
        key = (place.fd, place.serial)
        if key not in self._known:
            self._known[key] = self._map(place)
            if len(self._known) > _MAPPINGS_MAX:
                self._known.popitem(last=False)
        whole = self._known[key]
        if whole is None or place.offset + nbytes > whole.size:
            return None
        return whole[place.offset : place.offset + nbytes]

    def _map(self, place: Place) -> Bytes | None:
        try:
            fd = os.open(f"/proc/{self._pid}/fd/{place.fd}", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            about = os.fstat(fd)
            # Sealed against shrinking: touching it can never fault.
            sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
            if about.st_ino != place.serial or not sealed or not about.st_size:
                return None
            mapping = _Mapping(fd, about.st_size, mmap.MAP_POPULATE)
            weakref.finalize(mapping, _libc.munmap, mapping.address, about.st_size).atexit = False
            return mapping.array()
        except OSError:
            return None
        finally:
            os.close(fd)
