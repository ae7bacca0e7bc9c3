"""Provision: an arena made before training needs it, and made larger when a state outgrows it."""

from pathlib import Path

import numpy as np

from ftkit.checkpoint.arena import Arena
from ftkit.checkpoint.chunks import CHUNK_BYTES, Share
from ftkit.checkpoint.layout import StateLayout
from ftkit.checkpoint.numa import MemoryNode
from ftkit.checkpoint.pages import new_file
from ftkit.checkpoint.slabs import SLABS, Geometry, Pin
from ftkit.core.errors import CapacityError, IntegrityError


def create_arena(
    path: Path,
    *,
    data_bytes: int,
    meta_bytes: int,
    part_bytes: int | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    slabs: int = SLABS,
    keep: Arena | None = None,
    node: MemoryNode | None = None,
) -> Arena:
    """Make an arena with its pages and put it at `path`, replacing what is there.

    Blocks for about a second a gigabyte of pages. The file appears at `path` whole or not
    at all; it is readable and writable by this user only.

    Args:
      path: where to; its directory decides the memory (/dev/shm) or disk used.
      data_bytes: tensor bytes of the largest part a slab may ever hold.
      part_bytes: of which each slab gets this many pages now; None for all. The rest is a
        hole in the file until a larger part is written (`SlabWriter.reserve`).
      meta_bytes: bytes of layout and small state of one snapshot.
      chunk_bytes: bytes under one digest.
      slabs: snapshots held: 3, and one for each tier below that pins one.
      keep: an arena of the same `chunk_bytes` whose good snapshots are carried over
        where they fit.
      node: the memory node on which its pages are to lie; None for where they are touched first.

    Returns:
      The arena, open for writing.

    Raises:
      CapacityError: the file system has not enough room; nothing was written.
    """
    geometry = Geometry(
        data_bytes=data_bytes, meta_bytes=meta_bytes, chunk_bytes=chunk_bytes, slabs=slabs
    )
    part_bytes = data_bytes if part_bytes is None else part_bytes
    with new_file(path, geometry, part_bytes=part_bytes, node=node) as building:
        if keep is not None:
            with Arena.open(building, writable=True) as new:
                _carry_over(keep, new)
    return Arena.open(path, writable=True)


def ensure_arena(
    path: Path,
    layout: StateLayout,
    *,
    replicas: int = 1,
    chunk_bytes: int = CHUNK_BYTES,
    slabs: int = SLABS,
    node: MemoryNode | None = None,
) -> Arena:
    """Open the arena at `path` for writing, made or made larger so that `layout` fits.

    Good snapshots of a smaller arena are carried over before it is replaced, so there is
    no moment without one. A damaged arena is replaced by an empty one. Call between
    captures: whoever has the old file mapped must open the new one.

    Args:
      path: where the arena lies, or is to lie.
      layout: of the state; a slab can hold all of it.
      replicas: among how many the state is shared out; there are pages for one share.
      chunk_bytes: as `create_arena`; an arena that is there keeps its own.
      slabs: as `create_arena`; an arena that is there keeps its own.
      node: as `create_arena`; an arena that is there stays where it is.

    Raises:
      CapacityError: as `create_arena`; the old arena is untouched.
    """
    # Layouts that grow by a name or two should not need a new file.
    meta_bytes = layout.meta_bytes + len(layout.encoded) // 4
    need, share = layout.total_bytes, Share(0, replicas)
    try:
        old = Arena.open(path, writable=True)
    except (FileNotFoundError, IntegrityError):
        return create_arena(
            path,
            data_bytes=need,
            meta_bytes=meta_bytes,
            part_bytes=share.bytes_max(need, chunk_bytes),
            chunk_bytes=chunk_bytes,
            slabs=slabs,
            node=node,
        )
    if old.fits(layout):
        return old
    with old:
        return create_arena(
            path,
            data_bytes=max(need, old.geometry.data_bytes),
            meta_bytes=max(meta_bytes, old.geometry.meta_bytes),
            part_bytes=share.bytes_max(need, old.geometry.chunk_bytes),
            chunk_bytes=old.geometry.chunk_bytes,
            slabs=old.geometry.slabs,
            keep=old,
            node=node,
        )


def _carry_over(old: Arena, new: Arena) -> None:
    """Copy the good snapshots of an arena, with their pins."""
    for slab, sealed in enumerate(old.slabs()):
        if sealed is None:
            continue
        try:
            head = old.head(sealed)
            pins = [pin for pin, on in zip(Pin, old.pins(slab), strict=True) if on]
            copy = new.adopt(old.head_bytes(sealed), pins=pins)
            copy.reserve()
            for chunk, block in enumerate(old.blocks(head)):
                at = chunk * sealed.chunk_bytes
                copy.data[at : at + len(block)] = np.frombuffer(block, dtype=np.uint8)
            copy.seal()
        except (IntegrityError, CapacityError):
            # A damaged snapshot is lost already; it must not keep the others back.
            continue
