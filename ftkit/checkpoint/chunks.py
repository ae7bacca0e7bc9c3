"""Chunks: a layout cut into the pieces that are copied and checksummed as one (pure)."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from ftkit.checkpoint.layout import StateLayout
from ftkit.core.errors import IntegrityError

#: 1 MiB fits the second-level cache, so the digest reads what the copy has just written.
CHUNK_BYTES = 1 << 20

#: The index of a `Piece` that is padding between tensors and is written as zeros.
PADDING = -1


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes of one entry: `count` of them from `offset`, to byte `at` of the data."""

    entry: int
    offset: int
    at: int
    count: int


@dataclass(frozen=True, slots=True)
class Unit:
    """What one worker copies and then digests: usually one chunk.

    A `whole` entry cannot be cut (its memory is strided), so all chunks it touches are one
    unit: otherwise one worker could digest a chunk that another is still writing.
    """

    pieces: tuple[Piece, ...]
    chunks: range


def chunk_count(data_bytes: int, chunk_bytes: int) -> int:
    """Chunks in so many bytes, the last one possibly shorter."""
    return -(-data_bytes // chunk_bytes)


def units(layout: StateLayout, chunk_bytes: int, whole: Collection[int] = ()) -> tuple[Unit, ...]:
    """Cut a layout into units that together write every byte of the data exactly once.

    Args:
      layout: what to cut.
      chunk_bytes: bytes of each chunk; the last may be shorter.
      whole: indices of entries that must be copied in one piece.
    """
    count = chunk_count(layout.total_bytes, chunk_bytes)
    pieces: list[list[Piece]] = [[] for _ in range(count)]
    joined = [False] * (count + 1)  # chunk i belongs to the same unit as chunk i - 1

    def cut(entry: int, at: int, size: int) -> None:
        start = at
        while at < start + size:
            chunk = at // chunk_bytes
            length = min(start + size, (chunk + 1) * chunk_bytes) - at
            pieces[chunk].append(Piece(entry, at - start, at, length))
            at += length

    end = 0
    for index, entry in enumerate(layout.entries):
        cut(PADDING, end, entry.at - end)
        end = entry.at + entry.bytes
        if not entry.bytes:
            continue
        if index in whole:
            first, last = entry.at // chunk_bytes, (end - 1) // chunk_bytes
            joined[first + 1 : last + 1] = [True] * (last - first)
            pieces[first].append(Piece(index, 0, entry.at, entry.bytes))
        else:
            cut(index, entry.at, entry.bytes)
    cut(PADDING, end, layout.total_bytes - end)

    found, first = list[Unit](), 0
    for chunk in range(1, count + 1):
        if not joined[chunk]:
            members = (p for c in range(first, chunk) for p in pieces[c])
            found.append(Unit(tuple(members), range(first, chunk)))
            first = chunk
    return tuple(found)


def scatter(
    layout: StateLayout, blocks: Iterable[memoryview | bytes], targets: Sequence[memoryview]
) -> None:
    """Distribute the data of a snapshot over its entries.

    Args:
      layout: how the data is laid out.
      blocks: the data in order, cut anywhere; each is read before the next is asked for.
      targets: one writable buffer of bytes (format "B") per entry, of the entry's size.

    Raises:
      IntegrityError: the blocks hold more or fewer bytes than the layout; the targets have been
        partly written.
      ValueError: the targets do not match the layout; nothing was written.
    """
    entries = layout.entries
    if [t.nbytes for t in targets] != [e.bytes for e in entries]:
        raise ValueError(f"{len(targets)} targets do not match the layout's {len(entries)} entries")
    at = first = 0
    for block in blocks:
        view = memoryview(block)
        end = at + len(view)
        index = first
        while index < len(entries) and entries[index].at < end:
            entry = entries[index]
            low, high = max(entry.at, at), min(entry.at + entry.bytes, end)
            if low < high:
                targets[index][low - entry.at : high - entry.at] = view[low - at : high - at]
            if entry.at + entry.bytes <= end:
                first = index + 1
            index += 1
        at = end
    if at != layout.total_bytes:
        raise IntegrityError(f"snapshot has {at} bytes of data, its layout {layout.total_bytes}")
