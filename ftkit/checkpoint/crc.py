"""CRC-32C (Castagnoli), the checksum of iSCSI and of zarr's `crc32c` codec.

Computed by ISA-L at the speed of memory where there is one, else by google-crc32c; both give
the value of RFC 3720, appendix B.4.
"""

import logging
from collections.abc import Callable
from functools import cache
from typing import cast

import google_crc32c
import numpy as np

from ftkit.checkpoint.isal import CALL_BYTES_MAX, Isal, load
from ftkit.checkpoint.raw import Bytes, Memory, address, flat

logger = logging.getLogger(__name__)

_Crc = Callable[[Bytes, int], int]

#: google-crc32c holds the GIL for a call: 1 MiB is about 0.1 ms.
_HELD_BYTES_MAX = 1 << 20


def crc32c(buffer: Memory, seed: int = 0) -> int:
    """The CRC-32C of some bytes.

    Args:
      buffer: any contiguous memory, read and not kept.
      seed: the checksum of the bytes before these: crc32c(a + b) == crc32c(b, crc32c(a)).

    Returns:
      0 to 2**32 - 1. With ISA-L the GIL is released meanwhile.

    Raises:
      ValueError: the buffer is not contiguous, or the seed is no checksum.
    """
    if not 0 <= seed < 1 << 32:
        raise ValueError(f"a CRC-32C seed is the CRC-32C of earlier bytes, not {seed}")
    return _chosen()(flat(buffer), seed)


def with_isal(library: Isal) -> _Crc:
    """The checksum as computed by this library."""

    def run(data: Bytes, seed: int) -> int:
        register = seed ^ 0xFFFFFFFF
        at = address(data)
        for start in range(0, data.nbytes, CALL_BYTES_MAX):
            count = min(CALL_BYTES_MAX, data.nbytes - start)
            register = library.crc32_iscsi(at + start, count, register)
        return register ^ 0xFFFFFFFF

    return run


def portable(data: Bytes, seed: int) -> int:
    """The checksum as computed by google-crc32c, which zarr depends on too."""
    for start in range(0, data.nbytes, _HELD_BYTES_MAX):
        # It takes read-only buffers only, by its type hint `bytes` only, and does not copy.
        piece = cast("bytes", data[start : start + _HELD_BYTES_MAX])
        seed = google_crc32c.extend(seed, piece)
    return seed


@cache
def _chosen() -> _Crc:
    library = load()
    if library is None:
        return portable
    fast = with_isal(library)
    sample = np.arange(4099, dtype=np.uint32).astype(np.uint8)[1:]
    if fast(sample, 7) != portable(sample, 7):
        logger.warning(
            "%s computes a wrong CRC-32C here; google-crc32c does it instead", library.path
        )
        return portable
    return fast
