"""Lifeline: a page of shared memory that says, before anything else does, that a process exits.

A process that is killed is seen to be gone, by its sockets, its pidfd or its parent, only when
the kernel has freed its memory: about 0.1 s for each gigabyte of it. But it lets
go of the robust mutexes that a thread holds before it frees anything (`set_robust_list(2)`). So
each process holds some in a page that others map, for as long as it lives, and who waits for one
of them (`lifeline_watch`) knows of its end within a millisecond.

The kernel wakes one of those who wait for a mutex, and that one might itself be killed or stand
still; so there are as many mutexes as *places* to watch from. The first line of the page holds a
nonce, by which a watcher knows that it opened the right page.

This is not a promise of POSIX: only Linux lets go of mutexes first, and has since robust futexes
came (kernel/exit.c: `exit_mm` begins with them).

Linux with glibc, on x86-64 and arm64; elsewhere `own` is None, and an exit is seen later.
"""

import ctypes
import fcntl
import os
import platform
import secrets
import threading
from typing import Final, NamedTuple

PAGE_BYTES: Final = 4096
#: One line for each mutex; glibc's has 40 or 48 bytes.
LINE_BYTES: Final = 64
#: Places to watch from; line 0 holds the nonce.
PLACES: Final = PAGE_BYTES // LINE_BYTES - 1
NONCE_BYTES: Final = 16
#: Parts of the first word of a mutex, as the kernel knows it.
WAITERS: Final = 0x8000_0000
OWNER_DIED: Final = 0x4000_0000

#: futex(2) by architecture; futex_waitv(2) is 449 on both.
_SYS_FUTEX: Final = {"x86_64": 202, "aarch64": 98}.get(platform.machine())
_ROBUST = _SHARED = 1
libc = ctypes.CDLL(None, use_errno=True)
_size, _pointer = ctypes.c_size_t, ctypes.c_void_p
libc.mmap.argtypes = (_pointer, _size, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64)
libc.mmap.restype = _pointer
libc.munmap.argtypes = (_pointer, _size)


class Told(NamedTuple):
    """Where others find the lifeline of a process of their host; safe to send as JSON."""

    pid: int
    fd: int
    """Its descriptor of the page."""
    serial: int
    """The page's inode: a descriptor may have come to mean something else."""
    nonce: str


def supported() -> bool:
    """Whether the C library and the machine are known to keep mutexes as we read them."""
    return _SYS_FUTEX is not None and platform.libc_ver()[0] == "glibc"


def own() -> Told | None:
    """This process's lifeline, made when it is first asked for; None where there can be none.

    Any thread. A thread of its own holds the mutexes until the process ends; a forked child has
    none of its parent's and makes its own.
    """
    global _own
    with _lock:
        if _own is None and supported():
            _own = _make()
        return _own


_lock = threading.Lock()
_own: Told | None = None


def _forget() -> None:
    global _own, _lock
    if _own is not None:
        os.close(_own.fd)
    _own, _lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget)


def _make() -> Told | None:
    fd = os.memfd_create("ftkit-lifeline", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, PAGE_BYTES)
    # A page that shrank would kill whoever reads it.
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    nonce = secrets.token_bytes(NONCE_BYTES)
    os.pwrite(fd, nonce, 0)
    page = map_page(fd, writable=True)
    held = threading.Event()
    holder = threading.Thread(target=_hold, args=(page, held), name="ftkit-lifeline", daemon=True)
    holder.start()
    while not held.wait(0.05):
        if not holder.is_alive():
            os.close(fd)
            return None
    return Told(os.getpid(), fd, os.fstat(fd).st_ino, nonce.hex())


def _hold(page: int, held: threading.Event) -> None:
    """(thread) Lock every mutex of the page, and live as long as the process."""
    attributes = ctypes.create_string_buffer(LINE_BYTES)
    libc.pthread_mutexattr_init(attributes)
    libc.pthread_mutexattr_setrobust(attributes, _ROBUST)
    libc.pthread_mutexattr_setpshared(attributes, _SHARED)
    for place in range(PLACES):
        mutex = _pointer(address(page, place))
        if libc.pthread_mutex_init(mutex, attributes) or libc.pthread_mutex_lock(mutex):
            return
        word = ctypes.c_uint32.from_address(address(page, place))
        if word.value != threading.get_native_id():
            return  # no mutex that the kernel would know
        # Otherwise the kernel sees no reason to wake anybody. Nobody waits yet.
        word.value |= WAITERS
    held.set()
    threading.Event().wait()


def map_page(fd: int, *, writable: bool = False) -> int:
    """The address at which the page of `fd` lies from now on; OSError when it cannot."""
    protection = 3 if writable else 1
    page = libc.mmap(None, PAGE_BYTES, protection, 1, fd, 0)
    if page in (None, _pointer(-1).value):
        raise OSError(ctypes.get_errno(), "cannot map a lifeline")
    return int(page)


def address(page: int, place: int) -> int:
    """Of the mutex at `place`, which is taken modulo `PLACES`."""
    return page + LINE_BYTES * (1 + place % PLACES)


def futex(word: int, operation: int, value: int) -> None:
    """The system call futex, without a timeout. `word` is an address."""
    libc.syscall(
        ctypes.c_long(_SYS_FUTEX or -1), _pointer(word), ctypes.c_int(operation),
        ctypes.c_uint32(value), None, None, ctypes.c_int(0),
    )  # fmt: skip
