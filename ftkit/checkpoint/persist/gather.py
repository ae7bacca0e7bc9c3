"""Gather: the bytes of the boxes that a node writes, in place where they are whole in its memory.

Everything is checked against the digests of the capture before it is handed on. What is read
in place may be overwritten while it is written, if its pin was lost: `still_there` says so
afterwards, and then what was written must not be committed.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ftkit.checkpoint.arena import Arena, arena_path
from ftkit.checkpoint.layout import StateLayout
from ftkit.checkpoint.open_part import Address, OpenPart, open_part
from ftkit.checkpoint.persist.division import Extent, Writing
from ftkit.checkpoint.persist.plan import Piece
from ftkit.checkpoint.slabs import Pin
from ftkit.core.errors import IntegrityError
from ftkit.core.ids import JobId, NodeId
from ftkit.core.inventory import Copy


class Gather:
    """The open parts of one snapshot. Use as a context, from one thread."""

    def __init__(
        self,
        *,
        job: JobId,
        directory: Path,
        node: NodeId,
        servers: Mapping[NodeId, Address],
        secret: bytes,
    ) -> None:
        """Open nothing yet.

        Args:
          job: whose arenas.
          directory: where those of this node lie.
          node: this one.
          servers: the byte server of each other node.
          secret: the job's.
        """
        self._job = job
        self._directory = directory
        self._node = node
        self._servers = servers
        self._secret = secret
        self._opened = ExitStack()
        self._parts: dict[Copy, OpenPart] = {}
        self._checked: set[Copy] = set()

    def keep(self, copies: Iterable[Copy]) -> None:
        """Pin this node's parts for the time they are read; they are no longer due.

        Raises:
          IntegrityError: one of them is gone.
        """
        for copy in copies:
            if copy.node != self._node:
                continue
            with Arena.open(self._path(copy), writable=True) as arena:
                sealed = arena.find(copy.step, copy.generation)
                if not arena.pin(sealed, Pin.PERSIST):
                    raise IntegrityError(f"step {copy.step} left {arena.path.name}")
                arena.pin(sealed, Pin.DUE, on=False)

    def layouts(self, copies: Iterable[Copy]) -> dict[str, StateLayout]:
        """Every layout of a snapshot by its digest, read from this node where it can be.

        Raises:
          IntegrityError: a part is gone, or damaged.
          WireError: its node does not answer.
        """
        found = dict[str, StateLayout]()
        for copy in sorted(copies, key=lambda c: (c.node != self._node, c.node, c.seat)):
            if copy.part.layout not in found:
                found[copy.part.layout] = self._open(copy).head.layout
        return found

    def small(self, copies: Iterable[Copy]) -> dict[str, Any]:
        """The small state of this node's seats, by seat."""
        newest = sorted((c for c in copies if c.node == self._node), key=lambda c: c.generation)
        return {str(c.seat): self._open(c).head.small for c in newest}

    def pieces(self, writings: Iterable[Writing]) -> Iterator[Piece]:
        """The boxes and their bytes, each valid until the next is asked for.

        Raises:
          IntegrityError: bytes are gone or not those that were captured.
          WireError: a node that has some does not answer.
        """
        for writing in writings:
            entry = writing.entry
            data = self._data(writing)
            yield Piece(
                entry.name, entry.dtype, entry.global_shape, entry.offsets, entry.shape, data
            )

    def still_there(self) -> None:
        """Raise IntegrityError when a part that was read in place may have been overwritten."""
        for part in self._parts.values():
            if part.memory is not None:
                part.memory().release()

    def close(self) -> None:
        """Close what was opened. Pins stay."""
        self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _data(self, writing: Writing) -> memoryview:
        first = writing.extents[0] if writing.extents else None
        if first is None:
            return memoryview(b"")
        if len(writing.extents) == 1 and first.copy.node == self._node:
            return self._in_place(first)
        data = bytearray(writing.entry.bytes)
        for extent in writing.extents:
            at = extent.first - writing.entry.at
            view = memoryview(data)[at : at + extent.end - extent.first]
            if extent.copy.node == self._node:
                view[:] = self._in_place(extent)
            else:
                self._read(extent, view)
        return memoryview(data)

    def _in_place(self, extent: Extent) -> memoryview:
        part = self._open(extent.copy)
        if extent.copy not in self._checked:
            # All at once: small tensors share a chunk, and it is read once for all of them.
            for _ in part.blocks(range(len(part.head.digests))):
                pass
            self._checked.add(extent.copy)
        first = part.head.sealed.first_byte
        assert part.memory is not None, "it is in this node's memory"
        return part.memory()[extent.first - first : extent.end - first]

    def _read(self, extent: Extent, into: memoryview) -> None:
        part = self._open(extent.copy)
        size, start = part.head.sealed.chunk_bytes, part.head.sealed.first_byte
        chunks = range((extent.first - start) // size, -(-(extent.end - start) // size))
        at = start + chunks.start * size
        for block in part.blocks(chunks):
            low, high = max(at, extent.first), min(at + len(block), extent.end)
            into[low - extent.first : high - extent.first] = block[low - at : high - at]
            at += len(block)

    def _open(self, copy: Copy) -> OpenPart:
        if copy not in self._parts:
            server = None
            if copy.node != self._node:
                server = self._servers.get(copy.node)
                if server is None:
                    raise IntegrityError(
                        f"node {copy.node} has a part of step {copy.step}, no server"
                    )
            opened = open_part(copy, self._path(copy), server, self._secret)
            self._parts[copy] = self._opened.enter_context(opened)
        return self._parts[copy]

    def _path(self, copy: Copy) -> Path:
        # Not the path that was sent: nothing outside the folder is ever opened.
        return arena_path(self._job, copy.seat, self._directory)
