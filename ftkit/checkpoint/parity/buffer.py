"""ParityBuffer: a file of shared memory that holds a node's parity of one round.

::

    page | meta: the stripe set, and the heads of its parts | digests | shard, shard, ...

As in an arena (`slabs`) the page is sealed last and holds the digests of meta and of the digest
table, which holds one digest for each chunk of a shard: whoever trusts the page can check the
rest. The heads of all parts of the group are here, so that what was lost can be sealed again
as it was, and checked. The file is kept from round to round, and its pages with it.
"""

import errno
import json
import mmap
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from ftkit.checkpoint.chunks import CHUNK_BYTES, chunk_count
from ftkit.checkpoint.parity.rounds import StripeSet
from ftkit.checkpoint.slabs import PAGE, is_whole, paged, seal_page
from ftkit.checkpoint.stripes import Place
from ftkit.core.errors import CapacityError, IntegrityError, ProtocolError
from ftkit.core.ids import NodeId

_MAGIC = b"ftparity"
#: Magic; bytes of meta, table and data; digests of meta and table.
_PAGE = struct.Struct("<8sQQQQQ")
_LENGTH = struct.Struct("<Q")

Heads = Mapping[NodeId, Sequence[bytes]]
"""The head of every part of a stripe set (`Arena.head_bytes`)."""


@dataclass(frozen=True, kw_only=True)
class ParityHead:
    """Everything about a node's parity of one round but the shards, checked."""

    stripes: StripeSet
    heads: Heads
    node: NodeId
    """Who keeps these shards."""
    digests: NDArray[np.uint64]
    """One for each chunk of each shard."""

    @cached_property
    def shards(self) -> dict[Place, tuple[int, int]]:
        """Where each shard lies: its first byte in the data, and its first chunk."""
        return shard_spots(self.stripes, self.node)

    def check(self, place: Place, chunk: int, data: memoryview) -> None:
        """Raise IntegrityError unless `data` is that chunk of a shard, as it was computed."""
        if place not in self.shards:
            raise IntegrityError(f"node {self.node} does not keep shard {place}")
        if xxhash.xxh3_64_intdigest(data) != int(self.digests[self.shards[place][1] + chunk]):
            raise IntegrityError(
                f"chunk {chunk} of parity shard {place.shard} of stripe {place.stripe} of step "
                f"{self.stripes.round.step} on node {self.node} does not match its digest"
            )

    @classmethod
    def parse(cls, data: bytes, node: NodeId) -> "ParityHead":
        """Read page, meta and table, without gaps.

        Args:
          data: what `read_head` returns.
          node: whose it is.

        Raises:
          IntegrityError: some digest fails, or the buffer was not sealed.
        """
        if not is_whole(data[:PAGE]):
            raise IntegrityError("the page of the parity is not sealed, or is damaged")
        magic, meta_bytes, table_bytes, _, meta_digest, table_digest = _PAGE.unpack_from(data)
        meta, table = data[PAGE : PAGE + meta_bytes], data[PAGE + meta_bytes :]
        whole = magic == _MAGIC and len(table) == table_bytes
        if not whole or xxhash.xxh3_64_intdigest(meta) != meta_digest:
            raise IntegrityError("the stripes and heads of the parity do not match their digest")
        if xxhash.xxh3_64_intdigest(table) != table_digest:
            raise IntegrityError("the digest table of the parity does not match its digest")
        try:
            stripes, heads = _parse_meta(meta)
        except (ProtocolError, ValueError, KeyError, struct.error) as error:
            raise IntegrityError(f"parity was sealed with nonsense: {error}") from error
        return cls(
            stripes=stripes, heads=heads, node=node, digests=np.frombuffer(table, dtype="<u8")
        )


class ParityBuffer:
    """One buffer of a node. One thread writes; reading never disturbs it."""

    def __init__(self, path: Path) -> None:
        """Name the file; nothing is made before the first round."""
        self.path = path
        self._map: mmap.mmap | None = None
        self._bytes: NDArray[np.uint8] = np.empty(0, dtype=np.uint8)

    def begin(self, stripes: StripeSet, heads: Heads, node: NodeId) -> dict[Place, memoryview]:
        """Begin to overwrite the buffer: from here on, what it held is gone.

        Blocks while memory is reserved, about a second a gigabyte, when the file must grow.

        Returns:
          Where each shard that `node` keeps goes; to be released before the next `begin`.

        Raises:
          CapacityError: shared memory is full; what the buffer held is gone nevertheless.
        """
        self.drop()
        spots, chunks, data_bytes = _layout(stripes, node)
        self._meta = _meta(stripes, heads)
        table_at = PAGE + paged(len(self._meta))
        self._data_at = table_at + paged(8 * chunks)
        self._reserve(self._data_at + data_bytes)
        self._table_at = table_at
        self._chunks, self._data_bytes = chunks, data_bytes
        self._shards = {
            place: (self._data_at + at, stripes.plan.stripes[place.stripe].length)
            for place, (at, _) in spots.items()
        }
        return {place: self._bytes[a : a + n].data for place, (a, n) in self._shards.items()}

    def seal(self) -> None:
        """Enter the digests of all shards, then declare the buffer whole: the last store."""
        table = np.empty(self._chunks, dtype="<u8")
        chunk = 0
        for at, count in self._shards.values():
            for first in range(at, at + count, CHUNK_BYTES):
                block = self._bytes[first : min(first + CHUNK_BYTES, at + count)]
                table[chunk] = xxhash.xxh3_64_intdigest(block.data)
                chunk += 1
        raw = table.tobytes()
        self._bytes[PAGE : PAGE + len(self._meta)] = np.frombuffer(self._meta, dtype=np.uint8)
        self._bytes[self._table_at : self._table_at + len(raw)] = np.frombuffer(raw, np.uint8)
        page = _PAGE.pack(
            _MAGIC,
            len(self._meta),
            len(raw),
            self._data_bytes,
            xxhash.xxh3_64_intdigest(self._meta),
            xxhash.xxh3_64_intdigest(raw),
        )
        self._bytes[:PAGE] = np.frombuffer(seal_page(page), dtype=np.uint8)

    def drop(self) -> None:
        """Declare that it holds nothing."""
        self._bytes[:PAGE] = 0

    def close(self) -> None:
        """Unmap the file, which stays."""
        self._bytes = np.empty(0, dtype=np.uint8)
        if self._map is not None:
            try:
                self._map.close()
            except BufferError:
                pass  # somebody holds a view; the mapping goes with the last of them
            self._map = None

    def _reserve(self, need: int) -> None:
        """Have a mapping of at least so many bytes, with all its pages."""
        if need <= len(self._bytes):
            return
        self.close()
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            status = os.statvfs(self.path.parent)
            free = status.f_bavail * status.f_frsize
            missing = need - os.fstat(fd).st_size
            # Asked before anything is taken: a half-made buffer would take what arenas need.
            if missing > free:
                raise CapacityError(
                    f"parity needs {need} bytes in {self.path.name}: {self.path.parent} has {free} "
                    f"bytes free ({missing - free} too few)"
                )
            os.posix_fallocate(fd, 0, need)
            self._map = mmap.mmap(fd, need, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.ENOMEM):
                raise
            raise CapacityError(
                f"parity needs {need} bytes and {self.path.parent} ran out: {error.strerror}"
            ) from error
        finally:
            os.close(fd)
        self._bytes = np.frombuffer(self._map, dtype=np.uint8)


def read_head(path: Path) -> bytes:
    """Page, meta and table of a buffer, without gaps, for `ParityHead.parse`.

    Raises:
      IntegrityError: there is none, it is not sealed, or its page is damaged.
    """
    with _opened(path) as fd:
        meta_bytes, table_bytes, _ = _sizes(fd)
        table_at = PAGE + paged(meta_bytes)
        return os.pread(fd, PAGE + meta_bytes, 0) + os.pread(fd, table_bytes, table_at)


def read_data(path: Path, at: int, count: int) -> bytes:
    """So many bytes of the shards, unchecked. IntegrityError: they are not there."""
    with _opened(path) as fd:
        meta_bytes, table_bytes, data_bytes = _sizes(fd)
        if at + count > data_bytes:
            raise IntegrityError(f"bytes {at} to {at + count} of {data_bytes} of parity")
        return os.pread(fd, count, PAGE + paged(meta_bytes) + paged(table_bytes) + at)


def data_offset(path: Path) -> int:
    """Where the shards begin in a buffer's file. IntegrityError: it is not sealed."""
    with _opened(path) as fd:
        meta_bytes, table_bytes, _ = _sizes(fd)
        return PAGE + paged(meta_bytes) + paged(table_bytes)


def shard_spots(stripes: StripeSet, node: NodeId) -> dict[Place, tuple[int, int]]:
    """The first byte and the first chunk of each shard that a node keeps; pure."""
    return _layout(stripes, node)[0]


def _layout(stripes: StripeSet, node: NodeId) -> tuple[dict[Place, tuple[int, int]], int, int]:
    """The spots, and how many chunks and bytes they take; pure."""
    spots, chunks, at = dict[Place, tuple[int, int]](), 0, 0
    for place in stripes.plan.kept(node):
        spots[place] = at, chunks
        length = stripes.plan.stripes[place.stripe].length
        chunks += chunk_count(length, CHUNK_BYTES)
        at += paged(length)
    return spots, chunks, at


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """The descriptor of a buffer, for reading. IntegrityError when it cannot be opened."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise IntegrityError(f"{path.name} cannot be opened: {error.strerror}") from error
    try:
        yield fd
    finally:
        os.close(fd)


def _sizes(fd: int) -> tuple[int, int, int]:
    page = os.pread(fd, PAGE, 0)
    if not is_whole(page):
        raise IntegrityError("the page of the parity is not sealed, or is damaged")
    magic, meta_bytes, table_bytes, data_bytes, _, _ = _PAGE.unpack_from(page)
    if magic != _MAGIC:
        raise IntegrityError(f"parity begins with {magic!r}, this ftkit reads {_MAGIC!r}")
    return meta_bytes, table_bytes, data_bytes


def _meta(stripes: StripeSet, heads: Heads) -> bytes:
    sizes = {str(node): [len(h) for h in found] for node, found in heads.items()}
    text = json.dumps({"set": stripes.to_json(), "heads": sizes}).encode()
    every = (head for found in heads.values() for head in found)
    return b"".join([_LENGTH.pack(len(text)), text, *every])


def _parse_meta(meta: bytes) -> tuple[StripeSet, Heads]:
    (length,) = _LENGTH.unpack_from(meta)
    at = _LENGTH.size + length
    value = json.loads(meta[_LENGTH.size : at])
    heads = dict[NodeId, list[bytes]]()
    for node, sizes in value["heads"].items():
        heads[NodeId(int(node))] = found = []
        for size in sizes:
            found.append(meta[at : at + size])
            at += size
    return StripeSet.from_json(value["set"]), heads
