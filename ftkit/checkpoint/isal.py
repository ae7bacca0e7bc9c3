"""ISA-L, Intel's storage arithmetic (BSD-3), found on this machine and bound with ctypes.

The wheel of PyEClib carries a recent build for x86-64 and aarch64, with the vector units'
code chosen at run time. Its own API copies everything twice and is 20 to 40 times slower than
the functions bound here, which work on any memory in place. ctypes lets go of the GIL for the
time of a call.

The name of the library inside the wheel is nobody's promise: whoever uses it tests it first
(`crc`, `erasure`) and has something else to fall back on.
"""

import ctypes
import logging
from collections.abc import Iterator, Sequence
from ctypes import POINTER, c_int, c_ubyte, c_uint, c_void_p
from functools import cache

from ftkit.checkpoint.galois import Matrix
from ftkit.checkpoint.raw import Bytes, address

logger = logging.getLogger(__name__)

#: ISA-L takes lengths as C int; pieces of this size keep vectors aligned as they were.
CALL_BYTES_MAX = 1 << 30


class Isal:
    """The functions of one ISA-L library that ftkit calls."""

    def __init__(self, path: str) -> None:
        """Bind the library at `path`. OSError or AttributeError when it is not ISA-L."""
        library = ctypes.CDLL(path)
        self.path = path
        rows = POINTER(c_void_p)
        self.crc32_iscsi = library.crc32_iscsi
        """(data, bytes, register) -> register; inverted neither before nor after."""
        self.crc32_iscsi.argtypes = [c_void_p, c_int, c_uint]
        self.crc32_iscsi.restype = c_uint
        self.ec_init_tables = library.ec_init_tables
        """(k, rows, coefficients of rows x k, tables of 32 x k x rows bytes to fill)."""
        self.ec_init_tables.argtypes = [c_int, c_int, POINTER(c_ubyte), POINTER(c_ubyte)]
        self.ec_init_tables.restype = None
        self.ec_encode_data = library.ec_encode_data
        """(bytes, k, rows, tables, k sources, rows targets): targets = matrix x sources."""
        self.ec_encode_data.argtypes = [c_int, c_int, c_int, POINTER(c_ubyte), rows, rows]
        self.ec_encode_data.restype = None


class Tables:
    """One GF(256) matrix, ready to be multiplied by ISA-L. Any number of threads may."""

    #: It reads all shards once, side by side, and keeps a few vectors of each: smaller blocks
    #: save no cache, and 1 MiB ones cost a tenth in calls. This bounds how long one call is.
    BLOCK_BYTES = 16 << 20

    def __init__(self, library: Isal, matrix: Matrix) -> None:
        self._library = library
        self._rows, self._columns = len(matrix), len(matrix[0])
        values = [value for row in matrix for value in row]
        # ISA-L expands each coefficient to 32 bytes for its vector instructions.
        self._tables = (c_ubyte * (32 * len(values)))()
        library.ec_init_tables(
            self._columns, self._rows, (c_ubyte * len(values))(*values), self._tables
        )

    def multiply(self, sources: Sequence[Bytes], targets: Sequence[Bytes]) -> None:
        """Set targets = matrix x sources, all of one length; targets overlap nothing."""
        read, written = [address(s) for s in sources], [address(t) for t in targets]
        length = targets[0].nbytes
        for at in range(0, length, self.BLOCK_BYTES):
            self._library.ec_encode_data(
                min(self.BLOCK_BYTES, length - at),
                self._columns,
                self._rows,
                self._tables,
                (c_void_p * self._columns)(*(a + at for a in read)),
                (c_void_p * self._rows)(*(a + at for a in written)),
            )


@cache
def load() -> Isal | None:
    """The first ISA-L that can be bound, None when there is none. Looks once a process."""
    for path in _candidates():
        try:
            return Isal(path)
        except (OSError, AttributeError) as error:
            logger.debug("%s is no usable ISA-L: %s", path, error)
    return None


def _candidates() -> Iterator[str]:
    from importlib import metadata  # it reads mail, of all things, and takes its time

    try:
        files = metadata.files("pyeclib") or []
    except metadata.PackageNotFoundError:
        files = []
    yield from (str(f.locate()) for f in files if f.name.startswith("libisal"))
    yield "libisal.so.2"
