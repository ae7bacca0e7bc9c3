"""The bytes of an arena: pages that say what they hold and can tell when they are torn (pure).

::

    file page | pins | slab 0                                      | slab 1 | slab 2 ...
                     | page | layout, small | digests | data       |

Every page ends with the xxh3_64 of all that precedes it, the slab's page holds the digests of
the layout and small state and of the digest table, and the table holds one digest for each
chunk of data: whoever trusts the page can check the rest. All numbers are little-endian.
The data is one part of a snapshot: whole chunks of its layout, from `first_byte` on.

The page of pins has one byte a slab and tier (`Pin`), not 0 while that tier reads the slab; it
has no digest. A pin keeps a slab from being chosen, no more: whoever reads still checks.

Write order: the page is zeroed, then meta, data and digests in any order, and the page last. A
process killed between any two stores leaves zeros or a page whose own digest fails: no snapshot.
"""

import json
import struct
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from ftkit.checkpoint.chunks import chunk_count
from ftkit.checkpoint.layout import StateLayout
from ftkit.core.errors import IntegrityError, ProtocolError
from ftkit.core.ids import Generation, Step
from ftkit.core.inventory import Part

PAGE = 4096
SLABS = 3
CHUNK_BYTES_MAX = 16 << 20
_FILE_MAGIC = b"ftarena2"
_SLAB_MAGIC = b"ftslab_2"
_FILE = struct.Struct("<8sQQQQ")
_SLAB = struct.Struct("<8sqqQQQQQQQQQQ")
_DIGEST = struct.Struct("<Q")


class Pin(IntEnum):
    """Who keeps a slab from being overwritten."""

    PARITY = 0
    """Its parity is being made, or is the newest there is."""
    PERSIST = 1
    """It is on its way to disk."""
    DUE = 2
    """It is to go to disk, unless a newer one is due before its turn has come."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """The sizes of an arena file, in bytes, and where its parts begin."""

    data_bytes: int
    meta_bytes: int
    chunk_bytes: int
    slabs: int = SLABS

    def __post_init__(self) -> None:
        if self.data_bytes < 0 or self.meta_bytes < 0:
            raise ValueError(f"sizes may not be negative: {self}")
        if not 0 < self.chunk_bytes <= CHUNK_BYTES_MAX:
            raise ValueError(f"chunks are 1 to {CHUNK_BYTES_MAX} bytes, not {self.chunk_bytes}")
        if not SLABS <= self.slabs <= PAGE // len(Pin):
            # Ranks differ by a step when a fault strikes: one slab being written, one sealed,
            # one that may be the last complete everywhere.
            raise ValueError(f"an arena has at least {SLABS} slabs, not {self.slabs}")

    @property
    def table_at(self) -> int:
        """Offset of the digest table in a slab."""
        return PAGE + paged(self.meta_bytes)

    @property
    def data_at(self) -> int:
        """Offset of the data in a slab."""
        return self.table_at + paged(8 * chunk_count(self.data_bytes, self.chunk_bytes))

    @property
    def slab_bytes(self) -> int:
        return self.data_at + paged(self.data_bytes)

    @property
    def file_bytes(self) -> int:
        return 2 * PAGE + self.slabs * self.slab_bytes

    def slab_at(self, slab: int) -> int:
        """Offset of a slab in the file."""
        return 2 * PAGE + slab * self.slab_bytes

    def pin_at(self, slab: int, pin: Pin) -> int:
        """Offset of a slab's pin in the file."""
        return PAGE + slab * len(Pin) + pin

    def to_page(self) -> bytes:
        return seal_page(
            _FILE.pack(_FILE_MAGIC, self.data_bytes, self.meta_bytes, self.chunk_bytes, self.slabs)
        )

    @classmethod
    def from_page(cls, page: bytes) -> "Geometry":
        """Read `to_page`. Raises IntegrityError when the page is torn or not an arena's."""
        if not is_whole(page):
            raise IntegrityError("the first page of the arena does not match its digest")
        magic, data_bytes, meta_bytes, chunk_bytes, slabs = _FILE.unpack_from(page)
        if magic != _FILE_MAGIC:
            raise IntegrityError(f"arena begins with {magic!r}, this ftkit reads {_FILE_MAGIC!r}")
        try:
            return cls(
                data_bytes=data_bytes, meta_bytes=meta_bytes, chunk_bytes=chunk_bytes, slabs=slabs
            )
        except ValueError as error:
            raise IntegrityError(f"the first page of the arena is nonsense: {error}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Sealed:
    """What the page of a sealed slab says."""

    generation: Generation
    step: Step
    layout_bytes: int = 0
    small_bytes: int = 0
    data_bytes: int = 0
    """Bytes of tensor data in this slab: the part."""
    chunk_bytes: int = 1
    first_byte: int = 0
    """Where the part begins in the data of the layout, a multiple of `chunk_bytes`."""
    total_bytes: int = 0
    """Bytes of data of the whole layout."""
    layout_digest: int = 0
    layouts: int = 1
    """How many different layouts make up the job's state."""
    meta_digest: int = 0
    """Of the layout's and the small state's bytes, one after the other."""
    table_digest: int = 0
    """Of the digest table."""

    @property
    def version(self) -> tuple[Generation, Step]:
        """Its place in the order of snapshots: a newer generation wins over a higher step."""
        return self.generation, self.step

    @property
    def part(self) -> Part:
        """Which part of the snapshot it is."""
        return Part(
            layout=f"{self.layout_digest:016x}",
            first=self.first_byte,
            end=self.first_byte + self.data_bytes,
            total=self.total_bytes,
            layouts=self.layouts,
        )

    @property
    def table_bytes(self) -> int:
        return 8 * chunk_count(self.data_bytes, self.chunk_bytes)

    @property
    def head_bytes(self) -> int:
        """Bytes of a head: page, layout, small state and digest table, without gaps."""
        return PAGE + self.layout_bytes + self.small_bytes + self.table_bytes

    def to_page(self) -> bytes:
        return seal_page(
            _SLAB.pack(
                _SLAB_MAGIC,
                self.generation,
                self.step,
                self.layout_bytes,
                self.small_bytes,
                self.data_bytes,
                self.chunk_bytes,
                self.first_byte,
                self.total_bytes,
                self.layout_digest,
                self.layouts,
                self.meta_digest,
                self.table_digest,
            )
        )

    @classmethod
    def from_page(cls, page: bytes) -> "Sealed | None":
        """What a page says; None when it is empty, its slab being written, or torn."""
        if not is_whole(page):
            return None
        magic, generation, step, *rest = _SLAB.unpack_from(page)
        layout, small, data, chunk, first, total, digest, layouts, meta, table = rest
        if magic != _SLAB_MAGIC or not 0 < chunk <= CHUNK_BYTES_MAX:
            return None
        return cls(
            generation=generation,
            step=step,
            layout_bytes=layout,
            small_bytes=small,
            data_bytes=data,
            chunk_bytes=chunk,
            first_byte=first,
            total_bytes=total,
            layout_digest=digest,
            layouts=layouts,
            meta_digest=meta,
            table_digest=table,
        )


@lru_cache(maxsize=8)
def _decode(encoded: bytes) -> StateLayout:
    """All parts of a snapshot, and all snapshots of a job, have the same layout or a few."""
    return StateLayout.decode(encoded)


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """Everything about a snapshot but its data, checked."""

    sealed: Sealed
    layout: StateLayout
    small: dict[str, Any]
    digests: NDArray[np.uint64]
    """One per chunk of the part, shape (chunks,)."""

    @property
    def first_chunk(self) -> int:
        """The part's first chunk, as a chunk of the layout."""
        return self.sealed.first_byte // self.sealed.chunk_bytes

    def span(self, first: int, end: int) -> range:
        """The chunks, counted from the part's first, of bytes `first` to `end` of the layout.

        Raises:
          IntegrityError: they are not whole chunks of this part.
        """
        part, size = self.sealed.part, self.sealed.chunk_bytes
        aligned = first % size == 0 and (end % size == 0 or end == part.total)
        if not aligned or not part.first <= first <= end <= part.end:
            raise IntegrityError(
                f"bytes {first} to {end} of step {self.sealed.step} are not whole chunks of the "
                f"part that is here: bytes {part.first} to {part.end} in chunks of {size}"
            )
        return range((first - part.first) // size, -(-(end - part.first) // size))

    @classmethod
    def parse(cls, data: bytes) -> "Head":
        """Read a head (page, layout, small state, digest table, without gaps).

        Raises:
          IntegrityError: some digest fails, or the slab was not sealed.
        """
        sealed = Sealed.from_page(data[:PAGE])
        if sealed is None:
            raise IntegrityError("the snapshot's page is not sealed, or does not match its digest")
        if len(data) != sealed.head_bytes:
            raise IntegrityError(
                f"head of step {sealed.step} has {len(data)} bytes, its page says "
                f"{sealed.head_bytes}"
            )
        table_at = PAGE + sealed.layout_bytes + sealed.small_bytes
        if xxhash.xxh3_64_intdigest(data[PAGE:table_at]) != sealed.meta_digest:
            raise IntegrityError(
                f"layout and small state of step {sealed.step} do not match their digest"
            )
        if xxhash.xxh3_64_intdigest(data[table_at:]) != sealed.table_digest:
            raise IntegrityError(f"digest table of step {sealed.step} does not match its digest")
        small_at = PAGE + sealed.layout_bytes
        try:
            layout = _decode(data[PAGE:small_at])
            small = json.loads(data[small_at:table_at])
        except (ProtocolError, ValueError) as error:
            raise IntegrityError(f"step {sealed.step} was sealed with nonsense: {error}") from error
        part = sealed.part
        if (part.total, part.layout) != (
            layout.total_bytes,
            layout.digest,
        ) or part.end > part.total:
            raise IntegrityError(
                f"step {sealed.step} is said to hold bytes {part.first} to {part.end} of "
                f"{part.total} of layout {part.layout}; its layout is {layout.digest} of "
                f"{layout.total_bytes} bytes"
            )
        if not isinstance(small, dict):
            raise IntegrityError(f"the small state of step {sealed.step} is no mapping")
        return cls(
            sealed=sealed,
            layout=layout,
            small=small,
            digests=np.frombuffer(data, dtype="<u8", offset=table_at),
        )

    def check(self, chunk: int, *pieces: memoryview) -> None:
        """Raise IntegrityError unless this is what was captured as this chunk of the part."""
        hasher = xxhash.xxh3_64()
        for piece in pieces:
            hasher.update(piece)
        found = hasher.intdigest()
        if found != int(self.digests[chunk]):
            raise IntegrityError(
                f"chunk {chunk} of {len(self.digests)} of step {self.sealed.step} has digest "
                f"{found:016x}, sealed was {int(self.digests[chunk]):016x}"
            )


def choose_slab(
    slabs: Sequence[Sealed | None], complete: Step | None = None, pinned: Collection[int] = ()
) -> int | None:
    """The slab to overwrite next, or None when none can be spared; pure.

    Args:
      slabs: what each slab holds; None for one that is empty, torn or half written.
      complete: the newest step known to be complete on every rank. It is kept where possible,
        for it may be the one all ranks return to.
      pinned: slabs that a tier below reads.

    Returns:
      A slab without a snapshot if there is one, else the oldest that is neither the newest,
      nor pinned, nor, unless only such are left, `complete`.
    """
    for slab, sealed in enumerate(slabs):
        if sealed is None:
            return slab
    held = sorted((s.version, slab) for slab, s in enumerate(slabs) if s is not None)
    older = [(step, slab) for (_, step), slab in held[:-1] if slab not in pinned]
    spare = [slab for step, slab in older if step != complete] or [slab for _, slab in older]
    return spare[0] if spare else None


def paged(count: int) -> int:
    """So many bytes, rounded up to whole pages."""
    return -(-count // PAGE) * PAGE


def seal_page(fields: bytes) -> bytes:
    """A page that says this, and proves it."""
    body = fields.ljust(PAGE - _DIGEST.size, b"\0")
    return body + _DIGEST.pack(xxhash.xxh3_64_intdigest(body))


def is_whole(page: bytes) -> bool:
    """Whether this is what `seal_page` made."""
    if len(page) != PAGE:
        return False
    (digest,) = _DIGEST.unpack_from(page, PAGE - _DIGEST.size)
    return bool(digest == xxhash.xxh3_64_intdigest(page[: PAGE - _DIGEST.size]))
