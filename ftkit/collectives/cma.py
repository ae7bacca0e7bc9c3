"""Cross-memory attach: reading a peer's private memory on the same host, without its help.

`process_vm_readv` copies once, straight from the peer's tensor, and fails with ESRCH when
the peer is gone. What it cannot know is whether the bytes still are what the peer offered:
a peer whose generation was aborted may reuse the buffer while we read. So each process
publishes a *valid word*: a number that names the current generation, zeroed before any
handle of an aborted operation completes, that is, before anybody can touch the buffers. A
reader that finds the word unchanged *after* its bulk reads knows that they came in time.
"""

import ctypes
import errno
import os
import secrets
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ftkit.collectives.meter import Pace
from ftkit.collectives.resident import Mappings, Place, allocate, find
from ftkit.core.errors import WireError

_libc = ctypes.CDLL(None, use_errno=True)
_PR_SET_PTRACER = 0x59616D61
_PR_SET_PTRACER_ANY = ctypes.c_ulong(-1)
_WORDS_BYTES = 16
_YAMA = Path("/proc/sys/kernel/yama/ptrace_scope")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class ProcessGoneError(WireError):
    """The process whose memory was asked for has ended."""


class _IoVec(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]


def _bind() -> object:
    function = getattr(_libc, "process_vm_readv", None)
    if function is not None:
        function.argtypes = [
            ctypes.c_int,
            ctypes.POINTER(_IoVec),
            ctypes.c_ulong,
            ctypes.POINTER(_IoVec),
            ctypes.c_ulong,
            ctypes.c_ulong,
        ]
        function.restype = ctypes.c_ssize_t
    return function


_readv = _bind()


def boot_id() -> str:
    """Names this host's kernel since it started; empty where the kernel does not say."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""


def read(pid: int, local: int, remote: int, length: int) -> None:
    """Copy `length` bytes from `remote` in process `pid` to `local` here. GIL released.

    Raises:
      ProcessGoneError: the process has ended.
      WireError: the range is not mapped there, or reading is not allowed.
    """
    if not callable(_readv):
        raise WireError("process_vm_readv is not available in this C library")
    done = 0
    while done < length:
        here, there = (
            _IoVec(local + done, length - done),
            _IoVec(remote + done, length - done),
        )
        count = _readv(pid, ctypes.byref(here), 1, ctypes.byref(there), 1, 0)
        if count <= 0:
            code = ctypes.get_errno()
            kind = ProcessGoneError if count < 0 and code == errno.ESRCH else WireError
            raise kind(
                f"cannot read {length} bytes of process {pid} (after {done}): "
                f"{os.strerror(code) if count < 0 else 'nothing left'}"
            )
        done += count


class ValidWord:
    """This process's published words: a nonce that proves reads hit us, and the valid word.

    They lie in resident memory, so that peers look at them without a call into the kernel.
    """

    def __init__(self) -> None:
        self._nonce = secrets.randbits(64)
        self._words: npt.NDArray[np.uint64] | None = allocate(_WORDS_BYTES).view(np.uint64)
        self._words[:] = (self._nonce, 0)
        # Yama's scope 1 lets only ancestors read us; our peers are siblings. They run as the
        # same user and hold the job's secret. Other scopes either need nothing or forbid it.
        try:
            if _YAMA.read_text().strip() == "1":
                _libc.prctl(_PR_SET_PTRACER, _PR_SET_PTRACER_ANY, 0, 0, 0)
        except OSError:
            pass  # no Yama in this kernel

    def hello(self) -> dict[str, object]:
        """What a peer needs to try reading us."""
        words = self._words
        address = 0 if words is None else words.ctypes.data
        return {
            "pid": os.getpid(),
            "boot": boot_id(),
            "words": address,
            "place": find(address, _WORDS_BYTES),
            "nonce": self._nonce,
        }

    def publish(self, generation: int) -> None:
        """From now on offers of `generation` hold."""
        assert self._words is not None, "nothing is published after close"
        self._words[1] = _mark(self._nonce, generation)

    def withdraw(self) -> None:
        """From now on no offer holds. Call before anybody may reuse an offered buffer."""
        if self._words is not None:
            self._words[1] = 0

    def close(self) -> None:
        """Withdraw, and give the memory back."""
        self.withdraw()
        self._words = None


class CmaPeer:
    """A peer whose memory we can read."""

    def __init__(self, pid: int, words: int, nonce: int, place: Place | None) -> None:
        self.pid = pid
        self.mapped = Mappings(pid)
        self._words = words
        self._nonce = nonce
        shared = None if place is None else self.mapped.view(place, _WORDS_BYTES)
        self._shared = None if shared is None else shared.view(np.uint64)
        self._local = np.zeros(2, dtype=np.uint64)
        self.pace = Pace()
        """How fast the peer's memory was read."""

    @classmethod
    def probe(cls, hello: object) -> "CmaPeer | None":
        """A peer that proved readable, or None: another host, or reading is not allowed."""
        if not isinstance(hello, Mapping) or not hello.get("boot"):
            return None
        try:
            pid, words, nonce = (int(hello[key]) for key in ("pid", "words", "nonce"))
        except (KeyError, TypeError, ValueError):
            return None
        if hello["boot"] != boot_id() or pid <= 0 or not 0 < words < 1 << 64:
            return None
        peer = cls(pid, words, nonce, _place_of(hello.get("place")))
        try:
            read(pid, peer._local.ctypes.data, words, _WORDS_BYTES)
        except WireError:
            return None
        return peer if peer._local[0] == nonce else None

    def read(self, local: int, remote: int, length: int) -> None:
        """Copy from the peer. WireError when it is gone or withdrew the mapping."""
        began = time.perf_counter()
        read(self.pid, local, remote, length)
        self.pace.add(length, time.perf_counter() - began)

    def holds(self, generation: int) -> bool:
        """Whether the peer's offers of `generation` still hold. WireError when it is gone.

        One whose words are mapped may have died: then what it offered is as it was at its end.
        """
        words = self._shared
        if words is None:
            words = self._local
            read(self.pid, words.ctypes.data, self._words, _WORDS_BYTES)
        nonce, valid = words.tolist()
        return bool(nonce == self._nonce and valid == _mark(self._nonce, generation))


def _place_of(told: object) -> Place | None:
    """The place in a hello; None when there is none, or it makes no sense."""
    if not isinstance(told, list) or len(told) != len(Place._fields):
        return None
    if not all(isinstance(n, int) and 0 <= n < 1 << 63 for n in told):
        return None
    return Place(*told)


def _mark(nonce: int, generation: int) -> int:
    # Tied to the nonce, so that a reused process id cannot hold the right number by chance.
    return (nonce ^ (generation + 1)) & (2**64 - 1) or 1
